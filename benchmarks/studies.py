"""The arms of benchmarks/policies.py: each study is a list of arms, each a policy at a budget and a chunk size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from benchmarks.candidates import MeanRankOptions
from omnimem.budget import AudioVisualBudget, Budget, BudgetOptions, SharedBudget, Signals, SplitBudget
from omnimem.policies import ControlOptions, DistinctOptions, PerturbationOptions, PolicyOptions
from omnimem.policies.baselines.h2o import H2OOptions
from omnimem.policies.baselines.hermes import HermesOptions
from omnimem.policies.baselines.infinipot_v import InfiniPotVOptions
from omnimem.policies.baselines.input_uniform import InputUniformOptions
from omnimem.policies.baselines.k_center import KCenterOptions
from omnimem.policies.baselines.keydiff import KeyDiffOptions
from omnimem.policies.baselines.lava import LavaOptions
from omnimem.policies.baselines.oracle import OracleOptions
from omnimem.policies.baselines.pyramidkv import PyramidKVOptions
from omnimem.policies.baselines.recent_frames import RecentFramesOptions
from omnimem.policies.baselines.recursive_uniform import RecursiveUniformOptions
from omnimem.policies.baselines.similarity import SimilarityOptions
from omnimem.policies.baselines.snapkv import SnapKVOptions
from omnimem.policies.baselines.streaming_llm import StreamingLLMOptions
from omnimem.policies.baselines.streammem import StreamMemOptions
from omnimem.policies.baselines.value_norm import ValueNormOptions

SHARED, SPLIT = "as_published", "shared_split"


@final
@dataclass(frozen=True, kw_only=True)
class Trial:
    """One arm; its default budget is our audio-visual split."""

    policy: PolicyOptions | MeanRankOptions
    budget: BudgetOptions | None = None
    pooled: bool = False  # layers as in the budget, audio and visual tokens in one pool
    chunk_tokens: int | None = None
    fewer: bool = False  # may hold fewer entries than the others: it leaves slots empty or skips frames

    def allocate(self, split: AudioVisualBudget, layers: int, slots: int, signals: Signals) -> Budget:
        """The slots of this arm."""
        budget = (self.budget or split).build(layers, slots, signals)
        if not self.pooled:
            return budget
        return replace(budget, slots=tuple((0, sum(pair)) for pair in budget.slots), split=False)


def both(name: str, options: Any, **settings: Any) -> dict[str, Trial]:
    """As published, and with our audio-visual split."""
    return {
        name: Trial(policy=options(preset=SHARED, **settings)),
        f"{name}_split": Trial(policy=options(preset=SPLIT, **settings)),
    }


def _psi(**settings: Any) -> Trial:
    return Trial(policy=PerturbationOptions(**settings))


def _ours(**settings: Any) -> Trial:
    return Trial(policy=DistinctOptions(**settings))


def _pool(trial: Trial) -> Trial:
    """The same in one pool of audio and visual tokens, every layer alike."""
    return replace(trial, budget=SharedBudget())


def _avba(ratio: float = 2.0, temperature: float = 0.2) -> AudioVisualBudget:
    return AudioVisualBudget(visual_audio_ratio=ratio, layer_temperature=temperature)


def _controls() -> dict[str, Trial]:
    rows = {}
    for name in ("recency", "uniform"):
        rows |= {name: Trial(policy=ControlOptions(name=name, preset=SHARED))}
        rows |= {f"{name}_split": Trial(policy=ControlOptions(name=name))}
    for seed in range(3):
        rows[f"random_{seed}"] = Trial(policy=ControlOptions(name="random", preset=SHARED, seed=seed))
        rows[f"random_{seed}_split"] = Trial(policy=ControlOptions(name="random", seed=seed))
    return rows


def _fewer(rows: Mapping[str, Trial]) -> dict[str, Trial]:
    return {name: replace(trial, fewer=True) for name, trial in rows.items()}


SPLIT_OF_ALL = _avba()  # chosen on calibration streams for psi; used if the config has no audio-visual budget
POLICIES: dict[str, Trial] = {
    "distinct": _ours(),
    "distinct_pool": _pool(_ours()),
    "distinct_heads": _ours(per_head=True),
    "distinct_heads_pool": _pool(_ours(per_head=True)),
    "omnimem": _psi(),
    "omnimem_pool": _pool(_psi()),
    "psi": _psi(coverage=0.0),
    "psi_pool": _pool(_psi(coverage=0.0)),
    "paper": _psi(name="paper"),
    "released": replace(_psi(name="released"), fewer=True),  # leaves slots empty
    **both("similarity", SimilarityOptions),
    **_controls(),
    **both("recursive_uniform", RecursiveUniformOptions),
    **_fewer(both("input_uniform", InputUniformOptions)),
    **_fewer(both("recent_frames", RecentFramesOptions)),
    **both("streaming_llm", StreamingLLMOptions),
    **both("value_norm", ValueNormOptions),
    **both("keydiff", KeyDiffOptions),
    **both("k_center", KCenterOptions),
    **both("h2o", H2OOptions),
    **both("snapkv", SnapKVOptions),
    "snapkv_released": Trial(policy=SnapKVOptions(preset="as_released")),
    **both("pyramidkv", PyramidKVOptions),
    **both("lava", LavaOptions),
    "lava_released": Trial(policy=LavaOptions(preset="as_released")),
    **both("infinipot_v", InfiniPotVOptions),
    "infinipot_v_released": Trial(policy=InfiniPotVOptions(preset="as_released")),
    "infinipot_v_reindexed": Trial(policy=InfiniPotVOptions(reindex=True)),
    **_fewer(both("streammem", StreamMemOptions)),  # the frame filter lets less be read
    **both("streammem_unfiltered", StreamMemOptions, frame_filter=False),
    **both("hermes", HermesOptions),
    "hermes_released": Trial(policy=HermesOptions(preset="as_released")),
    "hermes_reindexed": Trial(policy=HermesOptions(reindex=True)),
    **both("oracle", OracleOptions),
}
STUDIES: dict[str, dict[str, Trial]] = {
    "policies": POLICIES,
    "ablations": {  # each part of ours; and the paper's table 4, under its own score and under psi as we run it
        "full": _ours(),
        "no_split": replace(_ours(), pooled=True),
        "layers_alike": replace(_ours(), budget=_avba(temperature=math.inf)),
        "no_avba": _pool(_ours()),
        "own_tokens_by_head": _ours(per_head=True),
        "no_coverage": _ours(coverage=0.0),
        "coverage_power_1": _ours(coverage=1.0),
        "coverage_not_centred": _ours(centred=False),
        "coverage_of_inputs": _ours(compared="inputs"),
        "psi_instead": _psi(),
        "no_score": Trial(policy=KCenterOptions(preset="shared_split")),
        "psi_no_coverage": _psi(coverage=0.0),
        "psi_no_split": replace(_psi(coverage=0.0), pooled=True),
        "psi_no_avba": _pool(_psi(coverage=0.0)),
        "psi_similarity_only": _psi(coverage=0.0, sharpness=0.0),
        "paper_full": _psi(name="paper"),
        "paper_no_split": replace(_psi(name="paper"), pooled=True),
        "paper_no_avba": _pool(_psi(name="paper")),
        "paper_similarity_only": _psi(name="paper", sharpness=0.0),
        "paper_with_coverage": _psi(name="paper", coverage=0.5),
    },
    "candidates": {  # for the choice by the worst bed; all in one pool of equal layers
        "paper_pool": _pool(_psi(name="paper")),
        "omnimem_pool": _pool(_psi()),
        "distinct_pool": _pool(_ours()),
        **{f"omnimem_lambda_{value:g}": _pool(_psi(sharpness=value)) for value in (0.1, 0.3)},
        "omnimem_all": _pool(_psi(coverage_above=-1.0)),  # every token is discounted: the default until 2026-11-30
        "omnimem_beta_0.25": _pool(_psi(coverage=0.25, coverage_above=-1.0)),
        **{f"omnimem_above_{value:g}": _pool(_psi(coverage_above=value)) for value in (0.25, 0.75)},
        "omnimem_stride_4": _pool(_psi(query_stride=4)),
        "omnimem_inputs": _pool(_psi(compared="inputs")),  # exact cosines: the default until 2026-11-30, second part
        "omnimem_4_bits": _pool(_psi(sketch_bits=4)),  # the default of hours on 2026-11-30
        "omnimem_beta_1": _pool(_psi(coverage=1.0)),
        "mean_rank": _pool(Trial(policy=MeanRankOptions(weight=0.25))),
        **{f"omnimem_split_r{r:g}": replace(_psi(), budget=SplitBudget(visual_audio_ratio=r)) for r in (1.0, 2.0)},
    },
    "beds": {  # the rivals of README's figure; all in one pool of equal layers
        "paper_pool": _pool(_psi(name="paper")),
        **{name: POLICIES[name] for name in ("omnimem_pool", "distinct_pool", "k_center", "h2o", "snapkv", "random_0")},
    },
    "markers": {  # of models whose streams contain text; the others keep all of it
        **{name: _psi(name=name) for name in ("omnimem", "paper")},
        "released": replace(_psi(name="released"), fewer=True),
        "omnimem_keep": _psi(markers="keep"),
        "paper_with_group": _psi(name="paper", markers="with_group"),
        "distinct": _ours(),
        "distinct_keep": _ours(markers="keep"),
        "k_center_split": Trial(policy=KCenterOptions(preset="shared_split")),
        **{f"{name}_split": Trial(policy=ControlOptions(name=name)) for name in ("recency", "uniform", "random")},
    },
    "ratio": {  # table 3, at equal entries
        "no_split": replace(_psi(), pooled=True),
        **{f"r_{r:g}": replace(_psi(), budget=_avba(ratio=r)) for r in (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)},
    },
    "sharpness": {f"lambda_{value:g}": _psi(sharpness=value) for value in (0.0, 0.02, 0.1, 0.2, 0.5, 1.0)},
    "temperature": {
        f"T_{value:g}": replace(_psi(), budget=_avba(temperature=value))
        for value in (0.1, 0.2, 0.5, 1.0, 2.0, math.inf)
    },
    "chunks": {
        f"chunk_{tokens}": replace(_psi(), chunk_tokens=tokens, fewer=True)  # peaks differ
        for tokens in (144, 72, 36, 18)
    },
    "neighbours": {
        "arrival": _psi(),
        "pool": _psi(neighbours="pool"),
        "arrival_same_modality": _psi(of="modality"),
        "pool_same_modality": _psi(neighbours="pool", of="modality"),
    },
    "budgets": {
        "shared": _pool(_psi()),
        **{f"split_r{r:g}": replace(_psi(), budget=SplitBudget(visual_audio_ratio=r)) for r in (0.5, 1.0, 2.0, 5.0)},
        **{
            f"avba_r{r:g}_T{t:g}": replace(_psi(), budget=_avba(ratio=r, temperature=t))
            for r in (1.0, 2.0, 5.0)
            for t in (0.2, 0.5, 1.0, math.inf)
        },
    },
}
QUICK: tuple[str, ...] = ("distinct", "distinct_pool", "uniform_split", "snapkv_split", "infinipot_v_split", "oracle")
