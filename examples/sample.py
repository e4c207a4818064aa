"""Sample images of a run, rank their classes, and sample the last scale with a smaller model."""

import sys
from pathlib import Path

import numpy as np
import torch

from var_scale.evaluate.generate import to_uint8
from var_scale.evaluate.pictures import write_grid
from var_scale.evaluate.source import load_source
from var_scale.model.sampling import Hooks, SeedPerImage, Settings, class_log_likelihoods, sample

if len(sys.argv) != 2 or not Path(sys.argv[1], "config.yaml").exists():
    sys.exit("usage: python examples/sample.py RUN_FOLDER, such as runs/tiny/d07-s0")
run = Path(sys.argv[1])
source = load_source(str(run), torch.device("cpu"))
var = source.var

label_B = torch.tensor([0, 1, 2, 3])
settings = Settings(cfg=2.0, top_k=100, top_p=0.95)
# With one seed per image, an image is the same in any batch.
out = sample(var, label_B, settings, SeedPerImage([10, 11, 12, 13]))
pictures = to_uint8(out.images)

scores = class_log_likelihoods(var, out.tokens, range(source.classes))
print("sampled as", label_B.tolist(), "most likely under", scores.argmax(1).tolist())

smallest = sorted(run.resolve().parent.glob("d*/config.yaml"))[0].parent
helper = load_source(str(smallest), torch.device("cpu")).var
mixed = sample(
    var,
    label_B,
    settings,
    SeedPerImage([10, 11, 12, 13]),
    Hooks(models={len(var.patch_nums) - 1: helper}),
)
differ, total = int((mixed.tokens[-1] != out.tokens[-1]).sum()), out.tokens[-1].numel()
print(f"last scale by {smallest.name}: {differ} of {total} tokens differ")

rows = np.stack([pictures, to_uint8(mixed.images)])
write_grid(
    rows, Path("example-samples.png"), zoom=4, names=["one model", f"last scale by {smallest.name}"]
)
print("example-samples.png")
