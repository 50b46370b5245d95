"""A process that runs the command line on what it is told: a JSON line in, how it ended as a JSON line out.

Commands run in this process, one after the other; a crash of one of them is the end of it.
"""

import io
import json
import os
import sys
import traceback


def run(arguments: list[str], stdin: bytes) -> dict[str, object]:
    """Run the command line: exit status, what it wrote on stderr, and the traceback if there was one."""
    from sparsemm_edge import cli

    streams = sys.stdin, sys.stdout, sys.stderr
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace") for _ in range(2))
    status: object = None
    failure = ""
    sys.argv = ["sparsemm-edge", *arguments]
    sys.stdin, sys.stdout, sys.stderr = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"), out, err
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        failure = traceback.format_exc()
    finally:
        sys.stdin, sys.stdout, sys.stderr = streams
    err.flush()
    said = err.buffer.getvalue().decode("utf-8", "replace")  # type: ignore[attr-defined]
    return {"status": status, "err": said, "failure": failure}


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what llama.cpp writes past Python
    for line in sys.stdin:
        job = json.loads(line)
        arguments = [os.fsdecode(bytes.fromhex(word)) for word in job["arguments"]]
        print(json.dumps(run(arguments, bytes.fromhex(job["stdin"]))), file=answers, flush=True)
