"""Fit a law to any numbers.

Here they are eight invented models that follow a known law, 4.5 + (2 N / 1e9)^-0.23, with noise of
0.1 %.
"""

import numpy as np

from var_scale.laws import fit

params = 73728 * np.array([6, 8, 10, 12, 16, 20, 24, 30]) ** 3.0
losses = (4.5 + (2 * params / 1e9) ** -0.23) * np.exp(
    1e-3 * np.random.default_rng(0).standard_normal(8)
)

for form in ("power", "power_floor"):
    law = fit(params, losses, form)
    if not law.converged:
        print(form, law.reason)
        continue
    low, high = law.intervals["alpha"]
    at = law.at(4e9)
    print(
        f"{form}: {law.equation}; exponent {low:.3f} to {high:.3f}; at 4e9 parameters "
        f"{at.low:.3f} to {at.high:.3f}; AICc {law.aicc:.1f}"
    )
