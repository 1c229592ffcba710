"""Recipe of statistics.json: what statsmodels finds for data that tests/test_comparison.py draws again.

python -m venv DIR && DIR/bin/pip install statsmodels && DIR/bin/python tests/recorded/statistics.py
"""

import json
from pathlib import Path

import numpy as np
import statsmodels
import statsmodels.api as sm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

TABLES = [(14, 5), (3, 0), (40, 61), (1, 1), (0, 12), (250, 198)]  # only the first right, only the second right
P_VALUES = [[0.01, 0.04, 0.03], [0.2, 0.001, 0.04, 0.012], [0.5, 0.9], [0.013, 0.013, 0.9, 0.04, 0.03]]
CLUSTERS = [(0, 200, 6), (1, 103, 15), (2, 300, 3)]  # seed, videos, most questions a video


def clustered(seed: int, videos: int, most: int) -> tuple[list[str], list[float]]:
    """Video and paired difference of each question; differences of one video lean the same way."""
    generator = np.random.default_rng(seed)
    names: list[str] = []
    values: list[float] = []
    for video in range(videos):
        lean = 0.1 * generator.standard_normal()
        for _ in range(int(generator.integers(1, most + 1))):
            names.append(f"v{video}")
            values.append(float(np.sign(round(generator.uniform(-0.6, 0.65) + lean))))
    return names, values


def cluster_robust(names: list[str], values: list[float]) -> dict[str, float]:
    """Mean difference and its cluster-robust standard error, from a regression on a constant."""
    groups = np.unique(names, return_inverse=True)[1]
    fitted = sm.OLS(np.array(values), np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    return {"mean": float(fitted.params[0]), "error": float(fitted.bse[0])}


if __name__ == "__main__":
    found = {
        "statsmodels": statsmodels.__version__,
        "mcnemar": [[a, b, float(mcnemar([[9, a], [b, 9]], exact=True).pvalue)] for a, b in TABLES],
        "holm": [[p, multipletests(p, method="holm")[1].tolist()] for p in P_VALUES],
        "clustered": [[*setting, cluster_robust(*clustered(*setting))] for setting in CLUSTERS],
    }
    path = Path(__file__).with_name("statistics.json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)
