"""One module a command, which holds one function of the same name: arguments in, one call, tables out.

Commands import what they need when they run, so that `convert --help` does not load a model library.
"""
