"""Keep the frame of an image and redraw its centre as another class."""

import sys

import torch
from PIL import Image

from var_scale.evaluate.edit import box_mask, edit
from var_scale.evaluate.generate import draw
from var_scale.evaluate.source import load_source
from var_scale.model.sampling import Settings
from var_scale.scales import grid

if len(sys.argv) != 2:
    sys.exit("usage: python examples/edit.py RUN_FOLDER, such as runs/tiny/d07-s0")
source = load_source(sys.argv[1], torch.device("cpu"))
picture = draw(source, [0], [0], 7, Settings())[0]
middle = box_mask((0.25, 0.25, 0.75, 0.75), grid(source.var.patch_nums[-1]))
edited = edit(source, picture, middle, label=1, count=3, seed=0)
Image.fromarray(edited[0]).save("example-edit.png")
print(f"{len(edited)} edits; the first: example-edit.png")
