"""Every registered objective with options that show what it can do."""

from megatron_profit.objectives import Objective, build_objective

OPTIONS = {
    "sft": [{}],
    "profit": [
        {"threshold_direction": "higher", "prob_threshold": 0.2},
        {"threshold_direction": "lower", "prob_threshold": 0.2},
        {"threshold_direction": "middle", "prob_threshold": (0.1, 0.4)},
        {"threshold_direction": "random", "keep_fraction": 0.6},
        {"threshold_direction": "higher", "prob_threshold": 0.2, "objective_signal": "reference"},
        {"threshold_direction": "middle", "threshold_quantile": (0.2, 0.8)},
        {
            "threshold_direction": "lower",
            "threshold_quantile": 0.7,
            "threshold_scope": "running",
            "objective_signal": "reference",
        },
    ],
    "entropy": [{}, {"keep_fraction": 0.5, "rank_scope": "global_batch"}],
    "psft": [{}, {"clip_low": 0.0, "clip_high": 0.0}],
    "dft": [{}, {"objective_signal": "reference"}],
    "gce": [
        {},
        {"prob_exponent": 10.0},
        {"prob_exponent": 1e-3, "threshold_direction": "higher", "prob_threshold": 0.2},
        {"threshold_direction": "random", "keep_fraction": 0.6},
        {"prob_exponent": 0.5, "objective_signal": "reference"},
    ],
    "eaft": [{}, {"entropy_exponent": 0.333}],
    "deft": [{}, {"objective_signal": "reference"}],
    "chord-phi": [{}, {"objective_signal": "reference"}],
    "infosft": [{}, {"known_prob": 0.6, "objective_signal": "reference"}],
    "prift-prob": [{}],
    "prift-mass": [{}, {"mass_threshold": 0.8, "objective_signal": "current"}],
    "talr": [{}, {"least_weight": 0.2, "objective_signal": "reference"}],
    "iw-sft": [{}, {"ratio_min": 0.0, "ratio_max": 100.0}],
    "asft": [{}, {"kl_weight": 3.0}],
    "stm": [{}, {"ref_prob_threshold": 0.05}],
    "rho1": [{}, {"keep_fraction": 0.3, "rank_scope": "global_batch"}],
}


def every_objective() -> list[Objective]:
    """Those that train tokens of any probability, in a fixed order."""
    return [
        build_objective(name, **options) for name, cases in OPTIONS.items() for options in cases
    ]
