"""What holds for every model that evicts: no eviction, no change; heads keep and say what the oracle's do;
and a saved state goes on as if nothing had been between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from helpers.agreement import relative_error
from helpers.contexts import random_table
from helpers.oracle import Grid, Oracle, compare_kept, leads
from helpers.oracle import Prompt as OraclePrompt
from sparsemm_edge.runtime import VisionModel
from sparsemm_edge.runtime.context import Context
from sparsemm_edge.runtime.encode import encode
from sparsemm_edge.runtime.eviction import HeadBudgetTable
from sparsemm_edge.runtime.library import mtmd
from sparsemm_edge.runtime.prompt import ImagePart, Prompt

WINDOW, N_PREDICT = 8, 24


@dataclass(frozen=True)
class Case:
    """A model with a prompt, and how it evicts: by random budgets, `budget` on average."""

    name: str
    model: VisionModel
    prompt: Prompt
    budget: int
    n_ubatch: int | None = None

    def context(self, table: np.ndarray | None) -> Context:
        budgets = None if table is None else HeadBudgetTable(table, WINDOW, 7, None, "mixkv", True)
        return Context(self.model, budgets, n_ctx=self.prompt.n_tokens + 64, n_ubatch=self.n_ubatch)

    def read(self, context: Context) -> None:
        context.prefill(encode(self.model, self.prompt))

    def table(self) -> np.ndarray:
        return random_table(self.model, self.budget, WINDOW, self.prompt.n_tokens, residual=True)


def oracle_prompt(case: Case, oracle: Oracle) -> OraclePrompt:
    """For the oracle: the same tokens, and the embeddings of the image as mtmd computed them."""
    chunks: list[np.ndarray | Grid] = []
    for part in case.prompt.parts:
        if isinstance(part, ImagePart):
            tokens = mtmd.mtmd_input_chunk_get_tokens_image(part.chunk)
            columns = int(mtmd.mtmd_image_tokens_get_nx(tokens))
            chunks.append(Grid(case.model.encode_image(part), columns))
        else:
            chunks.append(part.tokens)
    return oracle.prompt_of(chunks)


def answer(context: Context, n: int = N_PREDICT) -> tuple[list[int], np.ndarray]:
    """A greedy answer, and the logits that it was chosen from [n, n_vocab]."""
    tokens, logits = [], []
    for _ in range(n):
        logits.append(context.logits())
        tokens.append(int(logits[-1].argmax()))
        context.decode(tokens[-1])
    return tokens, np.array(logits)


def check_that_large_budgets_change_nothing(
    case: Case, oracle: Oracle, oracle_prompt: OraclePrompt, error: float, rounding: float
) -> None:
    """The full cache says what PyTorch says but for `error`, the evicting one the same but for `rounding`."""
    enough = np.full_like(case.table(), case.prompt.n_tokens + 1)
    with case.context(None) as full, case.context(enough) as evicting:
        case.read(full)
        case.read(evicting)
        assert evicting.kv_stats().n_evictions == 0
        tokens, logits = answer(full)
        expected = oracle.run(oracle_prompt, force=tokens, n_predict=N_PREDICT)
        assert leads(expected, tokens).max() < 2e-2, "the full cache does not say what PyTorch says"
        assert relative_error(logits, expected.logits) < error
        others = []
        for token in tokens:
            others.append(evicting.logits())
            evicting.decode(token)
        assert relative_error(np.array(others), logits) < rounding


def check_what_heads_keep_and_say(
    case: Case, oracle: Oracle, oracle_prompt: OraclePrompt, error: float
) -> None:
    """Kept positions and greedy tokens are the oracle's, and logits but for `error`."""
    table = case.table()
    with case.context(table) as context:
        case.read(context)
        kept = context.kept()
        tokens, logits = answer(context)
        assert context.kv_stats().n_evictions == 1
    way = {"vote": "mixkv", "residual": True}
    agreement = compare_kept(oracle.run(oracle_prompt, table, WINDOW, 1, **way), kept)
    assert agreement.n_unexplained == 0 and agreement.share >= 0.97
    expected = oracle.run(oracle_prompt, table, WINDOW, N_PREDICT, kept=kept, force=tokens, **way)
    assert relative_error(logits, expected.logits) < error
    assert leads(expected, tokens).max() < 2e-2
    full = oracle.run(oracle_prompt, n_predict=N_PREDICT, force=tokens)
    assert relative_error(full.logits, expected.logits) > 2 * error, "what was evicted did not matter"


def check_that_a_saved_state_goes_on(case: Case) -> None:
    with case.context(case.table()) as context, case.context(case.table()) as other:
        case.read(context)
        answer(context, 4)
        state = context.state()
        other.restore(state)
        for heads, restored in zip(context.kept(), other.kept(), strict=True):
            assert all(map(np.array_equal, heads, restored))
        tokens = answer(context)[0][:1] * 3
        context.restore(state)
        found = []
        for each in (context, other):
            logits = []
            for token in tokens:
                each.decode(token)
                logits.append(each.logits())
            found.append(logits)
        assert np.array_equal(*found)
