"""The error for mistakes that the user can fix, with a code for programs and tests."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

EXIT_USER_ERROR = 2

CODES: dict[str, str] = {
    # root: arguments, files, locks
    "file.disk-full": "the disk is full",
    "file.not-metrics": "a line of metrics.jsonl is not a row, or a value in it has a wrong type",
    "argument.size": "a size or a list of sizes is not made of whole numbers from 1 up",
    "argument.grid": "a list of token grids is malformed",
    "argument.combination": "two options exclude each other, or one needs the other",
    "file.missing": "a file or folder that is needed does not exist",
    "file.lfs-pointer": "a file is the pointer that Git LFS leaves in its place",
    "file.csv-quote": "a quote in a CSV opens and does not close",
    "file.not-json": "a file is not valid JSON, or not of the kind that is needed",
    "file.not-text": "a file is not a text in UTF-8",
    "file.not-writable": "the place cannot be written to",
    # config
    "config.presets-missing": "the folder of presets is missing in the installation",
    "config.not-found": "there is no config file or preset of this name",
    "config.include-cycle": "a config file includes itself",
    "config.not-yaml": "a config file cannot be read or is not valid YAML",
    "config.deepspeed-json": "a DeepSpeed configuration is missing or is not a JSON object",
    "config.override": "an override is not of the form key=value, with a value in YAML",
    "config.unknown-key": "the config has no such key",
    "config.value": "a value in the config has a wrong type, is out of range or contradicts "
    "another",
    # cost
    "cost.shape": "the shape of a model is incomplete, unknown or impossible",
    "cost.argument": "a number or name that a cost is computed from is out of range or unknown",
    "cost.device": "the device is not in the table of known devices",
    # laws
    "laws.form-unknown": "there is no law form of this name, or not for these variables",
    "laws.variables": "a law form got too few or too many variables",
    "laws.not-numbers": "sizes or values are not lists of numbers",
    "laws.lengths-differ": "the columns of a fit have different lengths",
    "laws.not-positive": "a size is not a positive finite number",
    "laws.floor-negative": "the assumed irreducible part is negative",
    "laws.not-converged": "a fit without a result was asked for a prediction",
    "laws.no-draws": "a fit without bootstrap draws was asked for an interval",
    "laws.compare-forms": "only two converged fits of one form, power, power_floor or a surface, "
    "can be compared",
    "laws.compare-floors": "two laws to compare have different metrics or floors",
    "laws.compare-noiseless": "the points of two laws to compare have no noise",
    "laws.option": "weights, an objective, delta or rising are invalid, or not for this form",
    "laws.nested-forms": "the floor test needs fits of power and power_floor to the same points",
    "laws.advise-law": "advice on the next runs needs a converged law of one variable",
    "laws.advise-candidates": "advice needs candidates, each with a positive cost",
    # records
    "records.source-missing": "a source of runs does not exist",
    "records.source-unknown": "a folder contains no runs of a known kind",
    "records.run-missing": "a folder is not a run that has started",
    "records.run-incomplete": "a file of a run folder lacks a key, or has a value of a wrong type",
    "records.run-twice": "two sources have different numbers for one run",
    "records.study-empty": "no run of the study has started",
    "records.table-missing": "a table does not exist",
    "records.sizes-mixed": "runs of different sizes have the same value of the variable of a law",
    "records.table-encoding": "a table is not text in UTF-8",
    "records.table-empty": "a table has no line of column names",
    "records.table-separator": "commas do not separate the columns of a table",
    "records.table-column": "a table lacks a column, or has it twice",
    "records.table-cell": "a cell of a table has a wrong value, or a line too many cells",
    "records.map-field": "--map names an unknown field, or lacks a needed one",
    "records.official-console": "a log is the console output of the official trainer",
    "records.official-log": "a file is no official log.txt, has no epoch or is damaged",
    "records.official-tensorboard": "a folder is not a TensorBoard folder of the official trainer",
    "records.wandb-offline": "wandb's files of offline runs are not read",
    "records.wandb-name": "a wandb source is not wandb:ENTITY/PROJECT or "
    "wandb:ENTITY/PROJECT/STUDY",
    "records.wandb-server": "wandb refused the request, or is unreachable",
    "records.wandb-foreign": "another program recorded the run on wandb",
    "records.wandb-configs": "attempts of one run on wandb have different configs",
    "records.counts-differ": "two studies count other parameters as N, so their laws of N differ",
    "records.fit-floor": "--floor is given for a form that fits the floor itself",
    "records.fit-variables": "--x has too few or too many columns for the form",
    "records.fit-weights": "--weights is given for runs, which have no weights",
    "records.no-law": "the fit of a table did not converge (exit code 1)",
    # report
    # model
    "model.attention": "an attention back-end is unknown, or cannot run on the device or this call",
    "model.attention-package": "an attention back-end needs a package that does not work here",
    "model.hooks": "a model in the hooks of sampling does not fit to the first one",
    "model.hub-address": "an address of the Hugging Face hub is malformed",
    "model.hub-failed": "the Hugging Face hub did not give or take the files",
    "model.hub-package": "the package huggingface_hub is missing",
    "model.input": "a tensor does not fit to the sizes of the model or the tokenizer",
    "model.kernels": "a choice of the fused operators is unknown or does not fit to the call",
    "model.labels": "labels are out of range, or labels or seeds are not one per image",
    "model.pretrained": "a model folder has no description, or one that is unknown or incomplete",
    "model.official-form": "the official form cannot hold a model of this kind",
    "model.settings": "a setting of sampling is out of range or has the wrong number of values",
    "model.sizes": "the sizes of a model or a tokenizer do not fit together",
    "model.tokenizer-differs": "a model was made for another tokenizer",
    "model.tokenizer-missing": "a model or a run has no weights of a tokenizer",
    "model.weights-kind": "a file holds weights of another kind than requested",
    "model.weights-mismatch": "weights do not have the tensor names or shapes of the model",
    "model.weights-missing": "a weights file does not exist",
    "model.weights-nonfinite": "a tensor of a model has NaN or infinite values",
    "model.weights-unreadable": "a weights file is damaged, or holds more than plain weights",
    # data
    "data.class-range": "a class number is outside of the classes",
    "data.class-unknown": "a class does not exist in the training split",
    "data.class-unnamed": "a class has no name",
    "data.cache-size": "the shards exceed the cache",
    "data.csv-invalid": "a CSV of images is malformed",
    "data.csv-labels": "labels of a CSV mix numbers and names",
    "data.download-failed": "a file cannot be downloaded",
    "data.teacher-settings": "the settings of a teacher are invalid",
    "data.image-invalid": "an image cannot be decoded or read",
    "data.image-range": "the range of the numbers in an image is unknown",
    "data.image-sizes": "images have different sizes",
    "data.image-too-large": "an image has more pixels than can be read safely",
    "data.index-changed": "an index differs from its checksum",
    "data.kind": "shards are of another kind than needed",
    "data.shapes-settings": "the settings of the embedded images are invalid",
    "data.link-loop": "a link to a folder leads back to a folder that contains it",
    "data.manifest-invalid": "a manifest is malformed or was altered",
    "data.no-class-folders": "a folder has no class folders",
    "data.no-images": "a source has no images",
    "data.no-manifest": "a folder has no manifest, so its shards are incomplete",
    "data.no-samples": "a shard or data set has no sample",
    "data.no-source": "a source does not exist or is of no known form",
    "data.no-tars": "a folder has no tars",
    "data.not-npy": "a member of a tar is not an .npy array",
    "data.open-files": "a data set has more shards than a process may open files",
    "data.other-patch-nums": "tokens have other grids than the run",
    "data.other-settings": "a folder holds shards with other settings",
    "data.other-tokenizer": "tokens come from another tokenizer",
    "data.out-in-source": "the output is inside the source",
    "data.remote-verify": "shards at a URL cannot be verified",
    "data.resize-torch": "this PyTorch cannot resize by Lanczos",
    "data.sample-dots": "names in a tar have dots in front of the extension",
    "data.sample-images": "a sample of a tar has two images for one label",
    "data.sample-incomplete": "a sample of a tar lacks its payload or label",
    "data.sample-label": "a label is not a class number",
    "data.sample-twice": "the members of a sample are not adjacent or occur twice",
    "data.shard-missing": "a shard or index is missing or has another size",
    "data.shard-settings": "a setting of sharding is out of range",
    "data.shard-truncated": "a shard was truncated while a run reads it",
    "data.shard-unreadable": "a shard cannot be read",
    "data.split-name": "a split has an invalid name",
    "data.split-twice": "two folders have names of the same split",
    "data.tar-compressed": "a tar is compressed, or is another kind of archive",
    "data.tar-damaged": "a tar is truncated, damaged, or has bytes after its end",
    "data.tar-link": "an image or label of a tar is a link",
    "data.tar-sparse": "a tar has sparse members",
    "data.token-fields": "fields of token shards are missing",
    "data.token-shape": "tokens have another shape than their manifest",
    "data.tokenizer-output": "the tokenizer returned invalid tokens",
    "data.too-many-broken": "too many images are broken",
    "data.url-pattern": "URLs do not name the tars of one folder",
    "data.url-scheme": "the scheme of a URL is not supported",
    "data.views": "views need an image size",
    "data.vocabulary": "a vocabulary does not fit into uint16",
    "data.worker-killed": "the system killed a worker process",
    "data.batch-divide": "the batch does not divide over processes and micro-batches",
    "data.index-folder": "--out is missing for tars at URLs, or given for a folder",
    "data.shards-damaged": "shards do not match their manifest",
    # train
    "train.adversarial-size": "images are too small for the discriminator",
    "train.checkpoint-other-model": "a checkpoint does not fit the config of its run",
    "train.checkpoint-version": "a checkpoint was written by another version of var-scale",
    "train.class-names-differ": "training and validation data have other class names",
    "train.classes-differ": "data have another number of classes than the config",
    "train.deepspeed-key": "a key of engine.deepspeed contradicts the recipe or is not supported",
    "train.deepspeed-value": "a value of engine.deepspeed is invalid",
    "train.images-missing": "no image shards are given",
    "train.lpips-weights": "the perceptual loss needs weights",
    "train.not-official": "a file is not a checkpoint of the official trainer",
    "train.official-finished": "an official checkpoint leaves nothing to train",
    "train.official-other-model": "an official checkpoint belongs to another model",
    "train.part-missing": "a rank did not write its part of a checkpoint",
    "train.run-has-checkpoints": "the run folder already has checkpoints",
    "train.shard-changed": "a shard differs from its checksum",
    "train.shard-divide": "engine.shard does not divide the number of processes",
    "train.tokenize-failed": "a process that encodes images failed",
    "train.tokenize-folders": "encoding needs a folder of images and one for tokens",
    "train.tokenizer-locked": "another process trains this tokenizer",
    "train.tokenizer-nonfinite": "the loss of a tokenizer is not finite",
    "train.tokenizer-other": "the folder holds a tokenizer with other settings",
    "train.tokens-missing": "no token shards are given",
    "train.world-size": "another number of processes was started than requested",
    "train.fault-malformed": "VAR_SCALE_FAULT is malformed",
    "train.run-other-config": "the folder holds a run with another config",
    "train.no-run": "the folder is not a run folder",
    "train.no-checkpoint": "the run has no checkpoint, or none of this step",
    "train.checkpoint-invisible": "a rank does not see the checkpoint that rank 0 sees",
    "train.checkpoint-damaged": "a file of a checkpoint is missing or damaged",
    "train.checkpoint-other-config": "a checkpoint belongs to a run with another config",
    "train.checkpoint-other-data": "a checkpoint belongs to a run on other data",
    "train.checkpoint-other-precision": "a checkpoint was trained in another precision",
    # evaluate
    "evaluate.options-conflict": "options contradict each other",
    "evaluate.process-failed": "a process that samples failed",
    "evaluate.out-form": "--out does not fit the format",
    "evaluate.out-in-use": "the output exists and belongs to something else",
    "evaluate.nothing-to-draw": "nothing would be sampled or redrawn",
    "evaluate.box": "--box is malformed or contains no cell",
    "evaluate.picture": "a picture does not exist or cannot be read",
    "evaluate.extractor": "an extractor does not exist or is of another kind",
    "evaluate.too-few": "too few images for a covariance",
    "evaluate.extractors-differ": "reference and samples come from different extractors",
    "evaluate.statistics": "a file of statistics is malformed",
    "evaluate.other-tokens": "tokens belong to another model",
    "evaluate.image-number": "more images per class than seeds",
    "evaluate.other-settings": "the output holds images with other settings",
    "evaluate.no-images": "there are no images, or the file is of another form",
    "evaluate.image-sizes": "images have different sizes",
    "evaluate.class": "a class does not exist, is ambiguous, or named twice",
    "evaluate.option-unfit": "an option does not apply to this model",
    "evaluate.no-model": "a model does not exist or is of no known form",
    "evaluate.device": "this machine has no such device",
    "evaluate.tokens-missing": "the validation tokens of a model are not known",
    "evaluate.statistics-file": "the file for statistics exists, or is no .npz file",
    "evaluate.samples-missing": "a folder does not hold all samples that its record names",
    "evaluate.folder-not-empty": "a folder to write to is not empty",
    "evaluate.hub-address": "the name is not an address on the hub",
    "evaluate.not-a-model": "the folder holds no model",
    # jobs
    "jobs.worker-failed": "a process on one of the ranks failed",
    "jobs.run-locked": "another process is running this run",
    "jobs.run-failed": "a run ended without completing; status.json has the cause",
    "jobs.slurm-missing": "a command of SLURM does not exist on this machine",
    "jobs.slurm-failed": "a command of SLURM failed or refused a job; its message follows",
    "jobs.folder-name": "a folder's name does not fit into a SLURM script",
    # study
    "study.depths-missing": "study.depths is empty, so the study has no runs",
    "study.folder-missing": "the study has no folder: it was not run yet, or --runs is another",
    "study.sources-missing": "nothing is given to make the tokens from",
    "study.sources-conflict": "the data of a study are given in two ways at once",
    "study.shards-missing": "the shards that training or tokenising needs are not named",
    "study.weights-missing": "tokenizer.weights is not given, or its file does not exist",
    "study.tokenizer-given": "a tokenizer is to be trained, but tokenizer.weights is given",
    "study.nothing-to-generate": "the config has no embedded data set",
    "study.parallel-engine": "runs that train at the same time need the engine single",
    "study.teacher-vocabulary": "the tokenizer has too few codes for a teacher",
    "study.too-few-samples": "a generated data set is smaller than one batch",
    "study.image-size": "generated images have another size than the tokenizer takes",
    "study.classes-differ": "shards have another number of classes than the config",
    "study.other-data": "a run was trained on other tokens than the study has now",
    "study.in-use": "another process is running or submitting the study",
    "study.jobs-active": "SLURM has jobs of the study or run that have not ended",
    "study.over-budget": "the plan needs more device-hours than study.budget_hours",
    "study.batch-indivisible": "a batch does not divide into processes and micro-batches",
    "study.gpus-missing": "the machine has fewer GPUs than the run has processes",
    "study.shard-groups": "the processes do not divide into groups of engine.shard",
    "study.launcher-unfit": "the launcher cannot start this engine, or not on these nodes",
    "study.validation-is-training": "validation shards hold the samples of the training shards",
    "study.samples-unknown": "study.flops needs the number of training samples",
    "study.time-too-short": "cluster.time leaves no time to train",
    "study.run-unknown": "the study has no run of this name, or a folder is none of its runs",
    "study.run-complete": "a run that is complete cannot be retried",
    "study.runs-missing": "runs have not ended and are missing in the report",
    "study.no-runs": "no run has started, so there is nothing to report",
    "study.no-healthy-run": "no run passed the gate, so there is no law and nothing to sample",
    "study.no-law": "the metric has no law yet, so no next run can be advised",
    "study.cost-unknown": "no run is complete and no device is named, so a run has no cost",
    "study.reference-missing": "the images or statistics to compare samples with do not exist",
    # bench
    "bench.not-official": "the folder is not a checkout of the official code",
    "bench.official-config": "the config cannot be compared with the official trainer",
    "bench.not-writable": "a result file cannot be written",
    "bench.no-result": "a benchmark process failed",
    "bench.not-square": "the official trainer needs square images",
    "bench.campaign-stage": "the campaign has no stage of this name",
    "bench.campaign-running": "another campaign is running in this folder",
    "bench.kernels": "kernels cannot be timed here, or the result cannot be written",
    # commands
}
"""Every error code with its meaning, listed in docs/reference/errors.md.

Codes are stable: programs and tests match them, while the wording of a message may change.
"""


class UserError(Exception):
    """A mistake that the user can fix: one line that states what is wrong, where, and what to do.

    Args:
        message: that line, without a trailing full stop.
        code: one of `CODES`.
        exit_code: exit status of the command: 2, or that of a run that failed.
    """

    def __init__(self, message: str, *, code: str, exit_code: int = EXIT_USER_ERROR):
        super().__init__(message)
        self.code, self.exit_code = code, exit_code

    def __reduce__(self) -> tuple[Any, ...]:
        """A worker process sends its error to its parent as a pickle, which by default calls the
        class without the keywords."""
        return partial(UserError, code=self.code, exit_code=self.exit_code), self.args


class Preempted(KeyboardInterrupt):
    """A run was stopped on request and has saved its state; the same command continues it.

    The command exits with code 85.
    """


def require_grids(**values: Sequence[object]) -> None:
    """Check that each list of token grids is not empty and holds sides or (height, width) pairs.

    Raises:
        UserError: code `argument.grid` or `argument.size`.
    """
    for name, grids in values.items():
        sides = [
            side
            for patch_num in grids
            for side in (patch_num if isinstance(patch_num, tuple | list) else (patch_num,))
        ]
        require_positive(**{name: sides})
        pairs = [patch_num for patch_num in grids if isinstance(patch_num, tuple | list)]
        if any(len(pair) != 2 for pair in pairs):
            raise UserError(
                f"{name} is {grids!r}; give the side of each grid, or (height, width)",
                code="argument.grid",
            )


def require_positive(**values: object) -> None:
    """Check that each value is a whole number from 1 up, or a non-empty list of such numbers.

    Raises:
        UserError: code `argument.size`.
    """
    for name, value in values.items():
        items = list(value) if isinstance(value, tuple | list) else [value]
        if not items or any(
            isinstance(item, bool) or not isinstance(item, int) or item < 1 for item in items
        ):
            raise UserError(
                f"{name} is {value!r}; give whole numbers from 1 up", code="argument.size"
            )
