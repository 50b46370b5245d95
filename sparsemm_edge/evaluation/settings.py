"""Settings to compare: policy, budget, and options of both."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from sparsemm_edge import defaults
from sparsemm_edge.budgets import MAX_WINDOW, POLICIES, VOTES, BudgetSpec, window_for
from sparsemm_edge.errors import SparseMMError, check_within

LATER = ("again", "keep", "image")
"""What later questions evict: anything (`again`) or nothing (`keep`). With `image` no question evicts: the
image is evicted before the first one, by the votes of its own last positions."""

_AS_PUBLISHED: dict[str, Any] = {"vote": "snapkv", "residual": False, "water_fill": True}
METHODS: dict[str, dict[str, Any]] = {
    "paper": {"policy": "sparsemm", "floor_ratio": 0.1, **_AS_PUBLISHED},
    "snapkv": {"policy": "uniform", "floor_ratio": 0.0, **_AS_PUBLISHED},
    "pyramidkv": {"policy": "pyramid", "floor_ratio": 0.1, **_AS_PUBLISHED},
}
"""Published methods: what they fix of a Setting."""

_QUANTISED = ("q8_0", "q4_0")


@dataclass(frozen=True)
class Setting:
    """One cache configuration.

    Attributes:
        policy, floor_ratio, water_fill, seed, vote, residual: as in BudgetSpec.
        budget: mean head budget in positions; None with `retention`. Both are None for `full`.
        retention: mean head budget in per cent of the prompt.
        window: largest observation window in positions; see `window_of`.
        cache_type: the number type of K and V.
        later: what later questions of a conversation evict, one of LATER.
    """

    policy: str
    budget: int | None = None
    retention: float | None = None
    window: int = 0
    floor_ratio: float = 0.0
    water_fill: bool = True
    seed: int = 0
    cache_type: str = "f16"
    vote: str = defaults.VOTE
    residual: bool = defaults.RESIDUAL
    later: str = "again"

    @property
    def key(self) -> str:
        """A unique name for files of results."""
        return ",".join(f"{name}={value}" for name, value in asdict(self).items() if value is not None)

    def budget_of(self, n_prompt: int) -> int:
        """The mean head budget for a prompt of this length, in positions; at least 2."""
        if self.budget is not None:
            return self.budget
        assert self.retention is not None
        return max(2, round(self.retention / 100 * n_prompt))

    @property
    def size(self) -> str:
        """The budget in the unit in which it was asked for."""
        if self.policy == "full":
            return "100 %"
        return f"{self.retention:g} %" if self.budget is None else str(self.budget)

    def window_of(self, n_prompt: int) -> int:
        """The window for a prompt of this length, see budgets.window_for."""
        return window_for(self.budget_of(n_prompt), self.window)

    def spec(self, n_prompt: int, base: BudgetSpec) -> BudgetSpec:
        """How heads share the cache for a prompt of this length: `base` with this setting's attributes."""
        return base.override(
            policy=self.policy,
            budget=self.budget_of(n_prompt),
            window=self.window_of(n_prompt),
            floor_ratio=self.floor_ratio,
            vote=self.vote,
            residual=self.residual,
            water_fill=self.water_fill,
            seed=self.seed,
        )


def settings_of(
    *,
    policies: Sequence[str],
    budgets: Sequence[int] = (),
    retentions: Sequence[float] = (),
    windows: Sequence[int],
    floor_ratios: Sequence[float],
    water_fills: Sequence[bool],
    cache_types: Sequence[str] = ("f16",),
    votes: Sequence[str] = (defaults.VOTE,),
    residuals: Sequence[bool] = (defaults.RESIDUAL,),
    laters: Sequence[str] = ("again",),
    n_random: int = 3,
) -> list[Setting]:
    """All distinct combinations, the full cache first.

    Floor ratios and water-filling vary for `sparsemm` only; `pyramid` and `random` use the first floor ratio
    and water-filling, `uniform` needs neither. METHODS fix these, the vote and the residual slot.
    The full f16 cache is always included, as the reference. Policy `full` adds quantised full caches.

    Args:
        policies: of budgets.POLICIES and METHODS.
        budgets, retentions: mean head budgets in positions, or in per cent of the prompt; not both.
        windows, floor_ratios, water_fills, cache_types, votes, residuals, laters: as in Setting.
        n_random: seeds of policy `random`, from 0.

    Raises:
        SparseMMError: an unknown word, budgets in both units or in none, or a value out of its range.
    """
    for what, words, known in (
        ("policy", policies, (*POLICIES, *METHODS)),
        ("vote", votes, VOTES),
        ("rule for later questions", laters, LATER),
    ):
        unknown = [word for word in words if word not in known]
        if unknown:
            raise SparseMMError(f"unknown {what} {unknown[0]!r}: expected some of {', '.join(known)}")
    if bool(budgets) == bool(retentions):
        raise SparseMMError("give either budgets in positions or retentions in per cent")
    for what, values, low, high in (
        ("budget", budgets, 2, 2**31 - 1),
        ("retention", retentions, 0.01, 100),
        ("window", windows, 1, MAX_WINDOW),
        ("floor ratio", floor_ratios, 0, 1),
        ("number of random seeds", [n_random], 1, 1000),
    ):
        for value in values:
            check_within(f"the {what}", value, low, high)
    full_types = ["f16", *(_QUANTISED if "full" in policies else ()), *cache_types]
    settings = [Setting("full", cache_type=cache_type) for cache_type in full_types]
    for cache_type, word in product(cache_types, policies):
        if word == "full":
            continue
        axes: dict[str, Iterable[Any]] = {
            "policy": [word],
            "cache_type": [cache_type],
            "window": windows,
            "floor_ratio": floor_ratios if word == "sparsemm" else floor_ratios[:1],
            "water_fill": water_fills if word == "sparsemm" else [True],
            "vote": votes,
            "residual": residuals,
            "later": laters,
            "seed": range(n_random) if word == "random" else [0],
            "budget": budgets or [None],
            "retention": retentions or [None],
        }
        if word == "uniform":
            axes["floor_ratio"] = [0.0]
        axes |= {name: [value] for name, value in METHODS.get(word, {}).items()}
        settings += [Setting(**dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    return list(dict.fromkeys(settings))


def labels(settings: Sequence[Setting]) -> dict[Setting, str]:
    """Names of settings without their budgets: the policy, and what differs between settings of it."""
    found = {}
    for setting in settings:
        method = method_of(setting)
        like = [each for each in settings if method_of(each) == method]
        parts = [method]
        if len({each.floor_ratio for each in like}) > 1:
            parts.append(f"floor {setting.floor_ratio:g}")
        if not setting.water_fill:
            parts.append("no water-filling")
        if len({each.window for each in like}) > 1:
            parts.append(f"window {setting.window}")
        if method != "full" and method not in METHODS:
            parts += [] if setting.vote == defaults.VOTE else [setting.vote]
            parts += [] if setting.residual else ["no residual"]
        if len({each.later for each in like}) > 1:
            parts.append(f"later {setting.later}")
        if setting.cache_type != "f16":
            parts.append(setting.cache_type)
        found[setting] = ", ".join(parts)
    return found


def method_of(setting: Setting) -> str:
    """The published method that a setting equals, or its policy."""
    own = vars(setting).items()
    return next((method for method, fixed in METHODS.items() if fixed.items() <= own), setting.policy)
