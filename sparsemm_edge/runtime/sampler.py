"""Sampling with llama.cpp's samplers, in its order and with its defaults."""

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from sparsemm_edge.closing import Closing
from sparsemm_edge.errors import SparseMMError, check_attributes, check_within, one_line
from sparsemm_edge.runtime import library
from sparsemm_edge.runtime.library import llama

_N_PENALISED = 64  # last tokens that the penalties look at, prompt included: llama.cpp's default
_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data
_MAX_SEED = 2**32 - 2  # llama.cpp takes the seed above it for "draw one"


@dataclass(frozen=True)
class Sampling:
    """Sampling options, stop texts and grammar.

    Attributes:
        temperature: 0 is greedy.
        seed: of the random numbers; -1: a new one each time.
        top_k: sample from this many most likely tokens; 0: from all.
        top_p: sample from the most likely tokens with this total probability.
        min_p: sample from tokens with at least this share of the top probability.
        repeat_penalty: divides the logits of the last 64 tokens; 1: no penalty.
        presence_penalty: subtracted from the logits of the last 64 tokens.
        frequency_penalty: subtracted once per occurrence. All three apply at temperature 0 too.
        stop: the answer ends before the first of these texts.
        grammar: GBNF that the answer follows.
        json_schema: JSON schema, as text, that the answer follows; instead of a grammar.

    Raises:
        SparseMMError: a number out of its range, or a schema or grammar that cannot be used.
    """

    temperature: float = 0.0
    seed: int = 0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    grammar: str | None = None
    json_schema: str | None = None

    def __post_init__(self) -> None:
        check_within("seed", self.seed, -1, _MAX_SEED)
        check_attributes(self)
        if "" in self.stop:
            raise SparseMMError("a stop text is empty")
        if self.grammar is not None and self.json_schema is not None:
            raise SparseMMError("give a grammar or a JSON schema, not both")
        _ = self.gbnf

    @cached_property
    def gbnf(self) -> str | None:
        """The grammar that the answer follows; a JSON schema's is made by llama-cpp-python."""
        if self.json_schema is None:
            return self.grammar
        from llama_cpp.llama_grammar import json_schema_to_gbnf

        try:
            if not isinstance(json.loads(self.json_schema), dict):
                raise SparseMMError("the JSON schema is not a JSON object")
            return str(json_schema_to_gbnf(self.json_schema))
        except SparseMMError:
            raise
        except ValueError as error:
            raise SparseMMError(f"the JSON schema is not JSON, or cannot be used: {error}") from error
        except Exception as error:  # the converter raises whatever it trips over
            reason = one_line(error)[:200]
            raise SparseMMError(f"the JSON schema cannot be turned into a grammar: {reason}") from error


class Sampler(Closing):
    """Samples tokens one by one. Close it or use it in a `with`: it owns llama.cpp memory."""

    def __init__(self, sampling: Sampling, vocab: int, said: Sequence[int] = ()) -> None:
        """Args:
        sampling: the options.
        vocab: llama_vocab pointer.
        said: the tokens of the prompt's text, which the penalties include.

        Raises:
            SparseMMError: the grammar is broken.
        """
        self._chain: Any = None
        self._grammar: Any = None
        n_vocab = int(llama.llama_vocab_n_tokens(vocab))
        self._candidates = np.empty(n_vocab, dtype=_TOKEN)
        self._ids = np.arange(n_vocab, dtype=np.int32)
        if (gbnf := sampling.gbnf) is not None:
            self._grammar = _grammar(vocab, gbnf)
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if penalties != (1, 0, 0):
            sampler = llama.llama_sampler_init_penalties(n_vocab, _N_PENALISED, *penalties)
            for token in said[-_N_PENALISED:]:
                llama.llama_sampler_accept(sampler, int(token))
            self._add(sampler)
        # so low a temperature makes logits infinite
        if sampling.temperature < 1e-4:
            self._add(llama.llama_sampler_init_greedy())
            return
        seed = llama.LLAMA_DEFAULT_SEED if sampling.seed == -1 else sampling.seed
        self._add(llama.llama_sampler_init_top_k(sampling.top_k))
        self._add(llama.llama_sampler_init_top_p(sampling.top_p, 1))
        self._add(llama.llama_sampler_init_min_p(sampling.min_p, 1))
        self._add(llama.llama_sampler_init_temp(sampling.temperature))
        self._add(llama.llama_sampler_init_dist(seed))

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                llama.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def sample(self, logits: npt.NDArray[np.float32]) -> int:
        """Sample the next token from logits [n_vocab].

        Raises:
            SparseMMError: no token satisfies the grammar.
        """
        self._candidates["id"], self._candidates["logit"] = self._ids, logits
        token = self._chosen(self._candidates)
        # a grammar looks at one token in a thousandth of the time that it takes for all: only if the choice
        # is against it are all looked at (as in llama.cpp's common_sampler_sample)
        if self._grammar and not self._allows(token):
            self._candidates["id"], self._candidates["logit"] = self._ids, logits
            array = _array(self._candidates)
            llama.llama_sampler_apply(self._grammar, ctypes.byref(array))
            if not np.isfinite(self._candidates["logit"]).any():
                raise SparseMMError("no token of this model satisfies the grammar or schema here")
            token = self._chosen(self._candidates)
        return token

    def accept(self, token: int) -> None:
        """Record a sampled token that does not end the answer."""
        llama.llama_sampler_accept(self._chain, token)
        if self._grammar:
            llama.llama_sampler_accept(self._grammar, token)

    def _add(self, sampler: Any) -> None:
        llama.llama_sampler_chain_add(self._chain, sampler)

    def _chosen(self, candidates: npt.NDArray[np.void]) -> int:
        array = _array(candidates)
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allows(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], dtype=_TOKEN)
        array = _array(one)
        llama.llama_sampler_apply(self._grammar, ctypes.byref(array))
        return bool(np.isfinite(one["logit"][0]))


class StopTexts:
    """Holds back text that may be the beginning of a stop text."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Add text; returns the part that can be shown."""
        self._held += text
        ends = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            shown, self._held = self._held[: min(ends)], ""
            return shown
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        keep = next(
            n
            for n in range(min(longest, len(self._held)), -1, -1)
            if not n or any(stop.startswith(self._held[-n:]) for stop in self._stop)
        )
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def rest(self) -> str:
        """The text held back at the end."""
        rest, self._held = self._held, ""
        return rest


def _array(candidates: npt.NDArray[np.void]) -> llama.llama_token_data_array:
    """The candidates as a llama.cpp array, which it sorts in place."""
    pointer = candidates.ctypes.data_as(llama.llama_token_data_p)
    return llama.llama_token_data_array(data=pointer, size=len(candidates), selected=-1, sorted=False)


def _grammar(vocab: int, gbnf: str) -> Any:
    """llama_sampler pointer, to be freed."""
    if not gbnf.strip():
        raise SparseMMError("the grammar is empty")
    library.forget_errors()
    with _stderr_of_c() as written:
        sampler = llama.llama_sampler_init_grammar(vocab, gbnf.encode("utf-8", "replace"), b"root")
        written.seek(0)
        said = written.read().decode("utf-8", "replace").partition("error parsing grammar: ")[2]
    if not sampler:
        reason = said.splitlines()[0][:200] if said else ""
        raise library.failure("the grammar is broken" + (f": {reason}" if reason else ""))
    return sampler


@contextmanager
def _stderr_of_c() -> Iterator[IO[bytes]]:
    """Redirect C's stderr to a file: llama.cpp prints a broken grammar there."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            try:
                yield file
            finally:
                os.dup2(before, 2)
    finally:
        os.close(before)
