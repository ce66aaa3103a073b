"""A GPU and a CPU agree; skipped where there is no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from commands import oodcli

from oodcli.files.scores import Scores, read_scores
from oodcli.metrics import evaluate_sets

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(scope="module")
def scored(fitted, tmp_path_factory) -> dict[str, dict[str, Scores]]:
    """device → set → scores of every detector that needs no images, and of two fitted ones."""
    folder = tmp_path_factory.mktemp("gpu")
    artefacts = [fitted / "fitted" / f"{name}.safetensors" for name in ("c2ir", "c2ir-z")]
    chosen = [word for name in ("all", *artefacts) for word in ("-d", name)]
    sets = {"id": fitted / "test.npz", "noise": "noise:uniform?n=600"}
    found: dict[str, dict[str, Scores]] = {}
    for device in ("cpu", "cuda"):
        found[device] = {}
        for name, images in sets.items():
            out = folder / f"{device}-{name}.csv"
            words = ("--device", device, "--precision", "float32", "-o", out)
            result = oodcli("score", fitted / "digits.pt", images, *chosen, *words)
            assert result.status == 0, result.err
            found[device][name] = read_scores(out)
    return found


def test_scores_agree_to_a_thousandth(scored):
    """Of the range of a detector's scores, which is stricter than of their size."""
    for name, on_cpu in scored["cpu"].items():
        on_gpu = scored["cuda"][name]
        for detector, expected in on_cpu.detectors.items():
            spread = np.ptp(expected[np.isfinite(expected)])
            np.testing.assert_allclose(
                on_gpu.detectors[detector], expected, rtol=0, atol=1e-3 * spread, err_msg=detector
            )


def test_aurocs_agree_to_a_tenth_of_a_point(scored):
    for detector in scored["cpu"]["id"].detectors:
        auroc = {}
        for device, files in scored.items():
            far = {"noise": files["noise"].detectors[detector]}
            result = evaluate_sets(files["id"].detectors[detector], far, resamples=0)
            auroc[device] = 100 * result["noise"]["auroc"].value
        assert auroc["cuda"] == pytest.approx(auroc["cpu"], abs=0.1), detector


def test_the_whole_pipeline_runs_on_it(fitted, tmp_path):
    virtual, cache = tmp_path / "v.h5", tmp_path / "v.features.h5"
    checkpoint = fitted / "digits.pt"
    for words in (
        ("invert", checkpoint, "--per-class", 5, "--device", "cuda", "-o", virtual),
        ("extract", checkpoint, virtual, "--device", "cuda", "-o", cache),
        ("fit", cache, "-d", "c2ir-z", "-o", tmp_path / "detectors"),
    ):
        result = oodcli(*words)
        assert result.status == 0, result.err
