"""Measures are compared with closed forms and second implementations; also their files, and
editing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from scipy.spatial import cKDTree

from tests.raises import raises
from tests.runs import run_here, small_config
from var_scale.cli import main
from var_scale.config.load import load
from var_scale.evaluate import extract as e
from var_scale.evaluate.edit import box_mask, edit
from var_scale.evaluate.measures import inception_score, precision_recall, radii
from var_scale.evaluate.read_images import read_images
from var_scale.evaluate.source import Source, load_source
from var_scale.model.frechet import Moments, frechet, frechet_distance
from var_scale.model.sampling import Settings

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    code, made = run_here(small_config(root, train={"steps": 4}), root / "r")
    assert code == 0
    return made.path


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return load_source(str(folder), torch.device("cpu"))


def noise_images(count: int, side: tuple[int, int], seed: int, mean: int = 128) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(mean, 40, (count, *side, 3)), 0, 255).astype(np.uint8)


def test_frechet_distance() -> None:
    """Closed forms (equal, shifted, scaled, commuting covariances), and scipy's matrix root on
    random covariances."""
    eye, zero = torch.eye(4), torch.zeros(4)
    assert frechet_distance(zero, eye, zero, eye) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(zero, eye, 3 * torch.ones(4), eye) == pytest.approx(36)
    assert frechet_distance(zero, 4 * eye, zero, 9 * eye) == pytest.approx(4 * (2 - 3) ** 2)
    a, b = (RNG.standard_normal((60, 8)) @ RNG.standard_normal((8, 8)) for _ in range(2))
    moments = []
    for sample in (a, b):
        m = Moments(8)
        for part in np.array_split(sample, 7):
            m.add(torch.from_numpy(part))
        moments.append(m)
    c1, c2 = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        c1 + c2 - 2 * np.real(sqrtm(c1 @ c2))
    )
    assert frechet(*moments) == pytest.approx(float(expected), rel=1e-9)


def test_inception_score() -> None:
    """One class gives 1; K classes that are certain and equally frequent give K; splits are in
    order; a second form without scipy gives the same."""
    assert inception_score(torch.eye(5)[torch.zeros(20, dtype=torch.long)])[0] == pytest.approx(1)
    sure = torch.eye(5)[torch.arange(20) % 5]
    assert inception_score(sure) == pytest.approx((5, 0))
    assert inception_score(torch.eye(5)[torch.arange(20) // 4], split=10)[0] == pytest.approx(
        math.exp(_entropy([4, 4, 2]))
    )
    p = RNG.dirichlet(np.ones(7), 40)
    mean, sd = inception_score(torch.from_numpy(p), split=20)
    by_hand = [
        math.exp(float((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()))
        for q in (p[:20], p[20:])
    ]
    assert mean == pytest.approx(np.mean(by_hand)) and sd == pytest.approx(np.std(by_hand))


def _entropy(counts: list[int]) -> float:
    share = np.array(counts) / sum(counts)
    return float(-(share * np.log(share)).sum())


def test_precision_and_recall() -> None:
    """A k-d tree gives the same values; equal sets give 1 and 1; distant sets give 0 and 0; samples
    of a part of the reference have high precision and low recall."""
    real, fake = (
        torch.from_numpy(RNG.standard_normal((n, 6)) + shift)
        for n, shift in ((400, 0.0), (300, 0.7))
    )
    found = precision_recall(real, fake)

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radius = cKDTree(centres).query(centres, k=4)[0][:, 3]
        return float(
            np.mean([(np.linalg.norm(centres - point, axis=1) <= radius).any() for point in points])
        )

    assert found.precision == pytest.approx(share(fake.numpy(), real.numpy()), abs=2e-3)
    assert found.recall == pytest.approx(share(real.numpy(), fake.numpy()), abs=2e-3)
    assert precision_recall(real, real) == type(found)(1.0, 1.0) and precision_recall(
        real, fake + 100
    ) == type(found)(0.0, 0.0)
    part = precision_recall(real, real[real[:, 0] > 1])
    assert part.precision == 1 and part.recall < 0.6
    assert torch.equal(
        radii(torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]])),
        torch.tensor([7.0, 6.0, 4.0, 7.0, 19.0]),
    )


def test_loss_of_a_run_is_what_it_recorded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command prints the numbers of the run's last evaluation, whatever the batch size; dropped
    labels give other numbers."""
    last = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text().splitlines()
        if '"eval"' in line
    ][-1]
    main(["evaluate", "loss", str(folder), "--json", str(tmp_path / "l.json"), "--batch", "5"])
    found = json.loads((tmp_path / "l.json").read_text())
    for name in ("loss_avg", "loss_last", "err_avg", "err_last", "loss_per_scale", "loss_avg_sem"):
        assert found[name] == pytest.approx(last[name], rel=1e-5), name
    assert found["loss_avg_blocks"] == pytest.approx(last["loss_avg_blocks"], rel=1e-5)
    printed = capsys.readouterr().out
    assert "loss_avg " in printed and "blocks" not in printed
    main(["evaluate", "loss", str(folder), "--label-dropout", "--json", str(tmp_path / "d.json")])
    assert json.loads((tmp_path / "d.json").read_text())["loss_avg"] != found["loss_avg"]
    main(["hub", "convert", str(folder), str(tmp_path / "ours")])
    tokens = load(str(folder / "config.yaml")).data.tokens_val
    main(
        [
            "evaluate",
            "loss",
            str(tmp_path / "ours"),
            "--tokens",
            str(tokens),
            "--json",
            str(tmp_path / "o.json"),
        ]
    )
    assert json.loads((tmp_path / "o.json").read_text())["loss_avg"] == pytest.approx(
        found["loss_avg"], rel=1e-6
    )
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "loss", str(tmp_path / "ours")])
    assert stopped.value.code == 2 and "give --tokens" in capsys.readouterr().err


def test_samples_against_a_reference(
    folder: Path, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images, our statistics and ADM's form of a reference give the same result; another extractor
    is refused; FD-tok is never called FID."""
    side = source.var.vae_proxy[0].image_size
    for name, seed, mean in (("ref", 0, 128), ("same", 1, 128), ("dark", 2, 60)):
        np.savez(tmp_path / f"{name}.npz", arr_0=noise_images(150, side, seed, mean))
    tok = f"tok:{folder}"
    main(
        [
            "evaluate",
            "stats",
            str(tmp_path / "ref.npz"),
            str(tmp_path / "stats.npz"),
            "--extractor",
            tok,
        ]
    )
    results = {}
    for name in ("same", "dark"):
        for reference in ("ref", "stats"):
            out = tmp_path / f"{name}-{reference}.json"
            places = [
                str(tmp_path / f"{name}.npz"),
                "--reference",
                str(tmp_path / f"{reference}.npz"),
            ]
            main(["evaluate", "samples", *places, "--extractor", tok, "--json", str(out)])
            results[name, reference] = json.loads(out.read_text())
    for name in ("same", "dark"):
        assert results[name, "ref"]["FD-tok"] == pytest.approx(
            results[name, "stats"]["FD-tok"], rel=1e-9
        )
        assert results[name, "ref"]["precision"] == results[name, "stats"]["precision"]
    assert (
        results["dark", "ref"]["FD-tok"] > 10 * results["same", "ref"]["FD-tok"]
        and "FID" not in results["same", "ref"]
    )
    assert results["same", "ref"]["precision"] > 0.8 > results["dark", "ref"]["precision"]
    with np.load(tmp_path / "stats.npz") as file:
        np.savez(tmp_path / "mar.npz", mu=file["mu"], sigma=file["sigma"])
        np.savez(
            tmp_path / "virtual.npz",
            mu=file["mu"],
            sigma=file["sigma"],
            arr_0=np.load(tmp_path / "ref.npz")["arr_0"],
        )
        np.savez(tmp_path / "other.npz", mu=file["mu"], sigma=file["sigma"], extractor="tok:other")
    extractor = e.load_extractor(tok, torch.device("cpu"))
    samples = e.statistics(read_images(tmp_path / "dark.npz"), extractor)
    mar, virtual = (
        e.compare_sets(e.read_reference(tmp_path / f"{n}.npz", extractor), samples, extractor)
        for n in ("mar", "virtual")
    )
    assert (
        mar["FD-tok"] == virtual["FD-tok"] == results["dark", "ref"]["FD-tok"]
        and "precision" not in mar
    )
    assert virtual["precision"] == results["dark", "ref"]["precision"]
    D = len(extractor.run(torch.zeros(1, 3, *side, dtype=torch.uint8)).pool_ND[0])
    for arrays, words in (
        ({"mu": np.zeros(D)}, "sigma none"),
        ({"mu": np.zeros(D), "sigma": np.zeros((2, D))}, "covariance"),
        ({"mu": np.full(D, np.nan), "sigma": np.eye(D)}, "not finite"),
    ):
        np.savez(tmp_path / "wrong.npz", **arrays)
        with raises("evaluate.statistics", words):
            e.read_reference(tmp_path / "wrong.npz", extractor)
    with raises("evaluate.extractors-differ", "other.npz"):
        e.read_reference(tmp_path / "other.npz", extractor)
    for text in ("inception", "script:no.pt", f"script:{tmp_path / 'ref.npz'}"):
        with raises("evaluate.extractor", text):
            e.load_extractor(text, torch.device("cpu"))
    capsys.readouterr()
    (tmp_path / "dark.npz.json").write_text('{"count": 200}')
    with pytest.raises(SystemExit):
        main(
            [
                "evaluate",
                "samples",
                str(tmp_path / "dark.npz"),
                "--reference",
                str(tmp_path / "stats.npz"),
                "--extractor",
                tok,
            ]
        )
    assert "holds 150 of 200 images" in capsys.readouterr().err
    np.savez(tmp_path / "few.npz", arr_0=noise_images(5, side, 1))
    main(
        [
            "evaluate",
            "samples",
            str(tmp_path / "few.npz"),
            "--reference",
            str(tmp_path / "stats.npz"),
            "--extractor",
            tok,
        ]
    )
    said = capsys.readouterr().out
    assert f"warning: 5 samples for {D} features" in said and str(tmp_path / "stats.npz") in said


class Net(torch.nn.Module):
    """The call of NVIDIA's TorchScript Inception, with eight features."""

    def forward(
        self, x: torch.Tensor, return_features: bool = False, no_output_bias: bool = False
    ) -> torch.Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, [2, 2]).flatten(1)[:, :8]
        return pooled if return_features else pooled.softmax(1)


class OtherNet(torch.nn.Module):
    """A network that does not accept this call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


def test_a_network_of_another_call(tmp_path: Path) -> None:
    torch.jit.script(OtherNet()).save(str(tmp_path / "net.pt"))
    with raises("evaluate.extractor", "net.pt"):
        e.load_extractor(f"script:{tmp_path / 'net.pt'}", torch.device("cpu")).run(
            torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
        )


def test_a_network_by_path(tmp_path: Path) -> None:
    """FID and IS of a TorchScript extractor equal those that are computed directly from its
    features."""
    torch.jit.script(Net()).save(str(tmp_path / "net.pt"))
    extractor = e.load_extractor(f"script:{tmp_path / 'net.pt'}", torch.device("cpu"))
    sets = [
        e.statistics(iter(np.array_split(noise_images(90, (8, 8), k), 4)), extractor)
        for k in (0, 1)
    ]
    found = e.compare_sets(*sets, extractor)
    tensors = [
        torch.from_numpy(noise_images(90, (8, 8), k)).permute(0, 3, 1, 2).float() / 255
        for k in (0, 1)
    ]
    features = [
        torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)[:, :8].numpy() for x in tensors
    ]
    c1, c2 = (np.cov(f.T) for f in features)
    by_hand = ((features[0].mean(0) - features[1].mean(0)) ** 2).sum() + np.trace(
        c1 + c2 - 2 * np.real(sqrtm(c1 @ c2))
    )
    assert (
        found["FID"] == pytest.approx(float(by_hand), rel=1e-4, abs=1e-8)
        and 1 <= found["IS"] < 1.1
        and found["IS_split"] == 5000
    )


def test_edit_keeps_what_the_mask_keeps(
    source: Source, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An empty mask gives the tokenizer's reconstruction; a full mask gives another image for each
    seed and the same image for the same seed; also boxes, mask files and the command."""
    vae = source.var.vae_proxy[0]
    side = vae.image_size
    image = noise_images(1, side, 4)[0]
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
    recon = vae.img_to_reconstructed_img(x, last_one=True)
    kept = edit(source, image, np.zeros((3, 3)), 1, 2, 0)
    expected = ((recon + 1) / 2 * 255).round().byte().permute(0, 2, 3, 1).numpy()  # type: ignore[operator]
    assert np.abs(kept.astype(int) - expected).max() <= 1
    drawn = edit(source, image, np.ones((3, 3)), -1, 3, 0, Settings(2.0))
    assert len({d.tobytes() for d in drawn}) == 3 and np.array_equal(
        drawn, edit(source, image, np.ones((3, 3)), -1, 3, 0, Settings(2.0))
    )
    mask = box_mask((0.0, 0.0, 1.0, 0.34), (3, 3))
    assert mask[:, 0].all() and not mask[:, 1:].any()
    for box in ((0.5, 0, 0.4, 1), (0, 0, 0.01, 0.01)):
        with raises("evaluate.box", "--box"):
            box_mask(box, (3, 3))
    Image.fromarray(image).save(tmp_path / "i.png")
    Image.fromarray(np.uint8([[0, 255], [0, 255]])).save(tmp_path / "m.png")
    for more in (
        ["--box", "0,0,0.5,0.5"],
        ["--mask", str(tmp_path / "m.png"), "--keep", "--as-class", "2"],
    ):
        main(
            [
                "edit",
                str(folder),
                str(tmp_path / "i.png"),
                *more,
                "--out",
                str(tmp_path / "e.png"),
                "--count",
                "2",
                "--top-k",
                "5",
            ]
        )
        assert Image.open(tmp_path / "e.png").size == (3 * (side[1] + 2) - 2, side[0] + 14 + 2 - 2)
    Image.new("L", (4, 4)).save(tmp_path / "black.png")
    for more, words in (
        ([], "[evaluate.options-conflict]"),
        (["--mask", str(tmp_path / "black.png")], "[evaluate.nothing-to-draw]"),
        (["--box", "0,0,1,1", "--keep"], "[evaluate.nothing-to-draw]"),
        (["--box", "0,0,1,1", "--out", str(tmp_path / "i.png")], "[evaluate.out-in-use]"),
        (["--box", "0,0,1,1", "--as-class", "77"], "--as-class 77"),
    ):
        with pytest.raises(SystemExit):
            main(["edit", str(folder), str(tmp_path / "i.png"), *more])
        assert words in capsys.readouterr().err


def test_quality_over_a_study() -> None:
    """A law between loss and distance is found, and the picture contains its data; two runs give no
    law, and the picture still shows them."""
    from var_scale.records.quality import Quality, fit_quality
    from var_scale.report.plots import figure_data
    from var_scale.report.quality_figure import quality_figure

    rows = [
        Quality(f"d{k}", 1e6 * k**3, 5 - 0.2 * k, 0.01 * (5 - 0.2 * k) ** 4) for k in (1, 2, 3, 4)
    ]
    fits = fit_quality(rows, "FD-tok")
    assert float(fits[0].predict(1 / 4.5)) == pytest.approx(0.01 * 4.5**4)
    assert fits[1].converged and fits[1].params["alpha"] > 0
    shown = figure_data(quality_figure(rows, fits, "FD-tok"))
    assert shown.count(",runs,") == 8 and "exponent" in shown
    few = fit_quality(rows[:2], "FD-tok")
    assert (
        not few[0].converged
        and figure_data(quality_figure(rows[:2], few, "FD-tok")).count(",runs,") == 4
    )
    noise = [
        Quality(f"d{k}", 1e6 * k**3, 5 - 0.2 * k, d)
        for k, d in enumerate((0.2, 0.3, 0.15, 0.28), 1)
    ]
    assert "exponent" not in figure_data(
        quality_figure(noise, fit_quality(noise, "FD-tok"), "FD-tok")
    )


@pytest.mark.slow
def test_against_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FID, IS, precision and recall of two folders by torch-fidelity and by us agree, with one
    Inception of random weights; skipped if torch-fidelity (the extra `eval`) is not installed."""
    try:
        import torch_fidelity
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    # With another version of torch, torchvision raises errors of many types.
    except Exception as error:
        pytest.skip(f"torch-fidelity: {error}")
    torch.manual_seed(0)
    weights = tmp_path / "inception.pth"
    torch.save({}, weights)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=str(weights),
        )
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1.0)  # type: ignore[union-attr]
    net.fc.weight.mul_(30)
    torch.save(net.state_dict(), weights)
    for number, name in enumerate(("real", "made")):
        (tmp_path / name).mkdir()
        for i, image in enumerate(noise_images(24, (32, 32), number)):
            Image.fromarray(
                (image * np.linspace(0.2, 1 - 0.2 * number, 24)[i]).astype(np.uint8)
            ).save(tmp_path / name / f"{i:03d}.png")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(tmp_path / "made"),
        input2=str(tmp_path / "real"),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        batch_size=8,
        verbose=False,
        isc=True,
        fid=True,
        prc=True,
        isc_splits=1,
        samples_shuffle=False,
        prc_neighborhood=3,
        feature_extractor="inception-v3-compat",
        feature_layer_prc="2048",
        feature_extractor_weights_path=str(weights),
    )
    extractor = e.load_extractor(f"fidelity:{weights}", torch.device("cpu"))
    reference = e.read_reference(tmp_path / "real", extractor)
    ours = e.compare_sets(reference, e.read_reference(tmp_path / "made", extractor), extractor)
    assert reference.spatial_mean_E is not None and len(reference.spatial_mean_E) == 17 * 17 * 7
    assert (
        ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
        and ours["FID"] > 0
    )
    assert (
        ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5) and ours["IS"] > 1.001
    )
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])
    torch.save(torch.nn.Linear(1, 1), weights)
    with raises("evaluate.extractor"):
        e.load_extractor(f"fidelity:{weights}", torch.device("cpu"))
