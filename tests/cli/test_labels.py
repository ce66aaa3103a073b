"""Names and numbers that come with images: which class of the network they are."""

from __future__ import annotations

import csv
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import oodcli
from networks import PREPROCESSING
from PIL import Image
from torch import Tensor, nn
from torchvision import datasets

import oodcli as api
from oodcli.images import open_images
from oodcli.images.labels import Labels, match, named, numbered, wnids, written
from oodcli.images.pieces import Piece, labels_of
from oodcli.networks import architectures
from oodcli.networks.assemble import assemble
from oodcli.networks.preprocessing import Preprocessing
from oodcli.stages.labels import SAMPLE, settle_labels, table_of
from oodcli.stages.ray import Decoder, Reading, pieces_of

K = 12
PLAIN = tuple(map(str, range(K)))
AS_TEXT = sorted(PLAIN)
IMAGENET = tuple(map(str, range(1000)))
PIXELS = Preprocessing((8, 8), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Levels(nn.Module):
    """K grey levels, an exact Gaussian classifier of the mean. levels: (K,) in [0, 1]."""

    def __init__(self, levels: list[float]) -> None:
        super().__init__()
        mean, spread = torch.tensor(levels), 2e-3
        self.fc = nn.Linear(2, len(levels))
        self.fc.weight.data = torch.stack([2 * mean / spread, -torch.ones(len(mean)) / spread], 1)
        self.fc.bias.data = -(mean**2) / spread

    def forward(self, x: Tensor) -> Tensor:
        m = x.mean((1, 2, 3))
        return self.fc(torch.stack([m, m * m], 1))


def level(number: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng((seed, number)).normal(0, 4, (8, 8, 3))
    return np.clip(10 + 20 * number + noise, 0, 255).astype(np.uint8)


def network(order: list[str], **settings):
    """Its class k has the grey level of the number order[k]."""
    levels = [(10 + 20 * int(name)) / 255 for name in order]
    return assemble(Levels(levels), arch="Levels", preprocessing=PIXELS, **settings)


def encoded(number: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(level(number, seed)).save(stream, "PNG")
    return stream.getvalue()


def folders(root: Path, names: list[str], count: int = 3) -> Path:
    """A folder for each name, with images of the grey level of that number."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(encoded(int(name), i))
    return root


def sources(tmp_path: Path, names: list[str]) -> dict[str, str]:
    """The same images in all kinds of IMAGES whose labels are text."""
    root = folders(tmp_path / "images", names)
    with (
        zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped,
        tarfile.open(tmp_path / "x.tar", "w") as tar,
    ):
        for path in sorted(root.rglob("*.png")):
            zipped.write(path, path.relative_to(root))
            tar.add(path, str(path.relative_to(root)))
    rows = [(path, path.parent.name) for path in sorted(root.rglob("*.png"))]
    (tmp_path / "list.txt").write_text("".join(f"{path}\t{name}\n" for path, name in rows))
    images = np.stack([np.asarray(Image.open(path)) for path, _ in rows])
    np.savez(tmp_path / "x.npz", images=images, labels=np.array([name for _, name in rows]))
    kinds = {"folder": root, "zip": "x.zip", "tar": "x.tar", "list": "list.txt", "npz": "x.npz"}
    return {kind: str(tmp_path / place) for kind, place in kinds.items()}


def accuracy(classifier, spec: str) -> tuple[float, str | None]:
    """Of the network by the labels that are settled, and the note."""
    source = open_images(spec, classifier.preprocessing, classifier.class_names)
    settle_labels(source, classifier)
    features = api.record(classifier, spec, "logits")
    assert (features.label >= 0).all()
    return float((features.logits.argmax(1) == features.label).float().mean()), source.note


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "list", "npz"])
@pytest.mark.parametrize("order", ["by number", "as text"])
def test_numbers_are_read_as_the_network_says(tmp_path, kind, order):
    spec = sources(tmp_path, list(PLAIN))[kind]
    classifier = network(AS_TEXT if order == "as text" else list(PLAIN))
    share, note = accuracy(classifier, spec)
    assert share == 1
    assert f"read {order}" in note
    assert "100.00% of a sample of 36 images" in note
    assert "16.67%" in note  # 0 and 1 alone are the same classes both ways
    assert "--class-names 0,1,2,3,…" in note
    assert "--class-names 0,1,10,11,…" in note


def test_subset_of_numbers_is_read_in_the_order_of_all_of_them(tmp_path):
    root = folders(tmp_path / "x", ["0", "2", "10", "11"])
    classifier = network(AS_TEXT)
    assert accuracy(classifier, str(root))[0] == 1
    assert open_images(str(root), PIXELS, PLAIN).known.others[0].values.unique().tolist() == [
        0, 2, 3, 4,
    ]  # fmt: skip


def test_class_names_settle_it_without_a_sample(tmp_path, monkeypatch):
    root = folders(tmp_path / "x", list(PLAIN))
    monkeypatch.setattr("oodcli.stages.labels._tried", None)
    share, note = accuracy(network(AS_TEXT, class_names=AS_TEXT), str(root))
    assert (share, note) == (1, None)
    share, note = accuracy(network(AS_TEXT, class_names=PLAIN), str(root))
    assert (share, note) == (pytest.approx(2 / 12), None)


def test_a_sample_that_does_not_tell(tmp_path):
    root = folders(tmp_path / "x", list(PLAIN))
    black = network(["12"] * K)  # right on one class, the first, whatever the order
    share, note = accuracy(black, str(root))
    assert "read by number" in note
    assert "cannot distinguish" in note
    assert f"{share:.2%} of 36 images either way" in note


def test_the_sample_is_spread_over_all_rows_and_the_same_every_time(tmp_path, monkeypatch):
    from oodcli.stages import labels as stage

    lines = [f"{name}.png\t{name}\n" for name in AS_TEXT for _ in range(50)]
    for name in AS_TEXT:
        (tmp_path / f"{name}.png").write_bytes(encoded(int(name)))
    (tmp_path / "list.txt").write_text("".join(lines))
    seen = []
    one = stage._Sample.__init__
    monkeypatch.setattr(
        stage._Sample, "__init__", lambda self, s, rows: (seen.append(rows), one(self, s, rows))[1]
    )
    for _ in range(2):
        assert accuracy(network(AS_TEXT), str(tmp_path / "list.txt"))[0] == 1
    assert len(seen) >= 2
    assert all(rows == seen[0] for rows in seen)
    assert seen[0] == [i * 600 // SAMPLE for i in range(SAMPLE)]


def test_unreadable_rows_are_not_counted_in_the_sample(tmp_path):
    root = folders(tmp_path / "x", list(PLAIN))
    (root / "10" / "0.png").write_bytes(b"no image")
    share, note = accuracy(network(AS_TEXT), str(root))
    assert share == 1
    assert "sample of 35 images" in note


def test_imagefolder_has_its_own_numbers(tmp_path):
    root = folders(tmp_path / "x", list(PLAIN))
    spec = f"torchvision:ImageFolder?root={root}"
    share, note = accuracy(network(datasets.ImageFolder(root).classes), spec)
    assert share == 1
    assert "classes 0 (0) to 11 (9)" in note


def test_a_dataset_that_numbers_its_classes_without_listing_them(monkeypatch):
    class Numbered(datasets.VisionDataset):
        def __init__(self):
            self.class_to_idx = {"b": 1, "a": 0, "alias": 0}

        def __len__(self):
            return 2

        def __getitem__(self, row):
            return Image.new("RGB", (8, 8)), 1 - row

    monkeypatch.setattr(datasets, "FakeData", Numbered)
    source = open_images("torchvision:FakeData", PIXELS, ("b", "a"))
    assert source.known.values.tolist() == [1, 0]


FROM_ONE = [0, 4, 5, 6, 7, 8, 9, 10, 11, 1, 2, 3]
FIVES = [8, 0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11]


@pytest.mark.parametrize(
    ("names", "number", "text"),
    [
        ([f"{i:03d}" for i in range(K)], list(range(K)), None),
        (["000", "011"], [0, 11], None),
        ([str(i) for i in range(1, K + 1)], list(range(K)), FROM_ONE),
        (["1", "2", "12"], [0, 1, 11], [0, 4, 3]),
        ([f"{i:02d}" for i in range(1, K + 1)], list(range(K)), None),
        ([str(5 * i) for i in range(1, K + 1)], list(range(K)), FIVES),
        (["3"], [3], [5]),
    ],
)
def test_readings_of_numbers(names, number, text):
    ordered = sorted(names)
    found = match(ordered, PLAIN, "folders")
    assert found.values.tolist() == [number[names.index(name)] for name in ordered]
    if text is None:
        assert not found.others
        assert found.note is not None  # none of these is a class's name
    else:
        (other,) = found.others
        assert other.values.tolist() == [text[names.index(name)] for name in ordered]
        assert "not as text" in found.note
        if len(names) == K:
            assert other.values.tolist() == list(range(K))


@pytest.mark.parametrize(
    ("names", "class_names"),
    [
        (["12"], PLAIN),
        (["2", "12"], PLAIN),
        (["0", "12"], PLAIN),
        (["0", "x"], PLAIN),
        (["-1", "3"], PLAIN),
        (["9" * 30], PLAIN),
        (["12", "3"], tuple("abcdefghijkl")),
    ],
)
def test_numbers_beyond_the_classes_are_unknown(names, class_names):
    found = match(names, class_names, "folders")
    assert set(found.values.tolist()) == {-1}
    assert "labels unknown" in found.note


def test_up_to_ten_classes_both_orders_agree():
    digits = tuple(map(str, range(10)))
    for names in (digits, ("0", "7")):
        found = match(names, digits, "folders")
        assert found == Labels(found.values, None, words=found.words, option=found.option,
                               what=found.what, by_number=found.by_number)  # fmt: skip
        assert found.values.tolist() == [int(name) for name in names]
    one = match([str(i) for i in range(1, 10)] + ["10"], digits, "folders")
    assert one.values.tolist() == list(range(10))


def test_numbers_are_class_numbers_although_classes_have_names():
    found = match(["0", "1", "2"], ("cat", "dog", "emu"), "sub-folders")
    assert found.values.tolist() == [0, 1, 2]
    assert "sub-folders read by number (0 is class 0, 2 is class 2)" in found.note
    assert written(["2", "-1", None, "0"], ("cat", "dog", "emu"), "labels").note is None
    assert written(["2", "-1", None, "0"], ("cat", "dog", "emu"), "x").values.tolist() == [
        2, -1, -1, 0,
    ]  # fmt: skip


def test_a_number_above_folders_with_names_is_no_class(tmp_path):
    for name in ("2/dog", "2/cat"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_bytes(encoded(1))
    assert open_images(str(tmp_path), PIXELS, ("cat", "dog", "emu")).known.values.tolist() == [0, 1]
    (tmp_path / "2/dog").rename(tmp_path / "2/x")
    (tmp_path / "2/cat").rename(tmp_path / "2/y")
    assert open_images(str(tmp_path), PIXELS, ("cat", "dog", "emu")).known.values.tolist() == [2, 2]


def test_integers_from_one():
    found = numbered(torch.tensor([1, 12, -1, 3]), K, "labels")
    assert found.values.tolist() == [0, 11, -1, 2]
    assert "from 1 to 12" in found.note
    assert numbered(torch.tensor([2, 12]), K, "labels").values.tolist() == [-1, -1]
    assert numbered(torch.tensor([0, 12]), K, "labels").values.tolist() == [-1, -1]
    assert numbered(torch.tensor([1, 11]), K, "labels").note is None
    assert numbered(torch.tensor([1, 12]), K, "labels", exact=True).values.tolist() == [-1, -1]
    assert numbered(torch.tensor([-1, -1]), K, "labels").values.tolist() == [-1, -1]


def test_classes_of_an_npz_that_are_numbers(tmp_path):
    """As ImageFolder's classes and targets are saved, or as plain names."""
    images = np.stack([level(int(name)) for name in AS_TEXT])
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(K), classes=np.array(AS_TEXT))
    for order in (AS_TEXT, list(PLAIN)):
        share, note = accuracy(network(order), str(tmp_path / "x.npz"))
        assert share == 1
        assert "classes of the file are numbers, read" in note


# ImageNet


def test_the_table_is_that_of_the_shared_images(shared_data):
    folder = shared_data.parent / "imagenet" / "id"
    if not folder.is_dir():
        pytest.skip("no ImageNet images")
    for path in folder.glob("*_n*_*.jpg"):
        number, wnid, _ = path.name.split("_", 2)
        assert wnids()[wnid] == int(number)


def test_the_table_of_wordnet_ids():
    assert len(wnids()) == 1000
    assert list(wnids()) == sorted(wnids())
    names = architectures.categories("torchvision:resnet18", 1000)
    for wnid, name in (("n01440764", "tench"), ("n02099601", "golden retriever"),
                       ("n15075141", "toilet tissue")):  # fmt: skip
        assert names[wnids()[wnid]] == name


def test_wordnet_ids_are_imagenets_classes():
    names = architectures.categories("torchvision:resnet18", 1000)
    synonyms = tuple(f"{name}, {name.upper()} species" for name in names)
    for class_names in (IMAGENET, names, synonyms, tuple(wnids())):
        found = match(list(wnids()), class_names, "sub-folders")
        assert found.values.tolist() == list(range(1000))
        subset = ["n01443537", "n02099601", "n15075141"]
        found = match(subset, class_names, "sub-folders")
        assert found.values.tolist() == [1, 207, 999]
    found = match(subset, names, "sub-folders")
    assert "n01443537 is class 1, n15075141 is class 999" in found.note
    assert named(["n15075141", None, "n01443537"], names, "labels").values.tolist() == [999, -1, 1]


def test_wordnet_ids_that_are_not_among_the_thousand():
    names = architectures.categories("torchvision:resnet18", 1000)
    most = match(["n00000001", "n01443537", "n02099601"], names, "sub-folders")
    assert most.values.tolist() == [-1, 1, 207]
    assert "1 of 3 (n00000001) are not among them" in most.note
    few = match(["n00000001", "n00000002", "n02099601"], names, "sub-folders")
    assert few.values.tolist() == [-1, -1, -1]
    assert "labels unknown" in few.note
    made_up = sorted(f"n{1440764 + 37 * i:08d}" for i in range(1000))
    found = match(made_up, names, "sub-folders")
    assert found.values.tolist() == list(range(1000))
    assert f"0 ({made_up[0]}) to 999 ({made_up[-1]})" in found.note
    assert set(match(made_up[:-1], names, "sub-folders").values.tolist()) == {-1}


def test_other_networks_have_no_wordnet_ids():
    subset = ["n01443537", "n02099601"]
    for class_names in (PLAIN, tuple(f"thing {i}" for i in range(1000))):
        assert set(match(subset, class_names, "sub-folders").values.tolist()) == {-1}


def test_numbers_of_imagenet_v2_are_class_numbers():
    names = architectures.categories("torchvision:resnet18", 1000)
    folders = sorted(map(str, range(1000)))
    for class_names in (names, IMAGENET):
        found = match(folders, class_names, "sub-folders")
        assert found.values.tolist() == [int(name) for name in folders]
        assert bool(found.others) == (class_names == IMAGENET)
        assert "sub-folders" in found.note


def test_where_classes_have_names_only_folders_are_ambiguous():
    names = tuple("abcdefghijkl")
    assert match(AS_TEXT, names, "sub-folders").others
    assert not written(AS_TEXT, names, "labels").others
    assert written(AS_TEXT, PLAIN, "labels").others


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def test_classes_in_groups_are_not_in_imagenets_order(tmp_path):
    for wnid in ("n01443537", "n02099601"):
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.png").write_bytes(encoded(1))
    arch = "torchvision:resnet18+mos:500,500"
    classifier = assemble(Grouped(), arch=arch, preprocessing=PREPROCESSING)
    source = open_images(str(tmp_path), PREPROCESSING, classifier.class_names)
    assert source.labelled
    assert settle_labels(source, classifier) is None
    assert not source.labelled
    assert "orders its classes by group" in source.note
    piece = Piece(0, "tar", "x.tar")
    assert table_of([piece], classifier)[0] == {}
    plain = assemble(Grouped(), arch="Grouped", preprocessing=PREPROCESSING)
    assert table_of([piece], plain)[0]["n01443537"] == 1


# where only a cluster reads


def test_labels_that_only_a_cluster_reads():
    classifier = network(AS_TEXT)
    names = tuple(f"/data/x/{name}/a.png" for name in PLAIN)
    table, note = table_of([Piece(0, "files", "/data/x", names=names)], classifier)
    assert table == {name: int(name) for name in PLAIN}
    assert "--engine ray does not test the alternatives" in note
    assert labels_of(["010", 3, "11", None], PLAIN, {"010": 10}).tolist() == [10, 3, 11, -1]
    assert labels_of(["n01443537", "5"], IMAGENET, wnids()).tolist() == [1, 5]
    named_so = network(list(PLAIN), class_names=PLAIN)
    assert table_of([Piece(0, "files", "/data/x", names=names)], named_so) == (table, None)


@pytest.mark.parametrize("reading", [0, 1, None])
def test_hosts_read_labels_as_the_users_process_has_settled(tmp_path, reading):
    root = folders(tmp_path / "x", list(PLAIN))
    source = open_images(str(root), PIXELS, PLAIN)
    (piece,) = pieces_of(source, 64)
    job = Reading(str(root), str(tmp_path), PIXELS, PLAIN, 64, reading)
    (payload,) = Decoder(job)({"piece": [pickle.dumps(piece)]})
    _, _, labels, *_ = pickle.loads(payload["data"][0])
    names = [path.split("/")[-2] for path in source.paths(0, len(source))]
    order = {0: list(PLAIN), 1: AS_TEXT}.get(reading)
    assert labels.tolist() == [-1 if order is None else order.index(name) for name in names]


# the command line


@pytest.fixture
def toy(tmp_path):
    """A checkpoint net.pt whose classes are numbered as ImageFolder does, and images/."""
    code = Path(__file__).read_text(encoding="utf-8")
    body = code[code.index("class Levels") : code.index("def level(")]
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import Tensor, nn\n" + body + f"\ndef net():\n"
        f"    return Levels([0.0] * {K})\n",
        encoding="utf-8",
    )
    state = network(AS_TEXT).network.state_dict()
    torch.save(state, tmp_path / "net.pt")
    folders(tmp_path / "images", list(PLAIN), 4)
    return tmp_path


MODEL = ("--input-size", 8, "--mean", "0,0,0", "--std", "1,1,1")


def labels_in(path: Path) -> list[tuple[str, str]]:
    with path.open() as stream:
        return [(row["label"], row["predicted"]) for row in csv.DictReader(stream)]


def test_score_and_extract_ask_the_network(toy):
    net = (toy / "net.pt", toy / "images", "--arch", f"{toy}/net.py:net", *MODEL)
    scored = oodcli("score", *net, "-d", "msp", "-o", toy / "s.csv")
    assert scored.status == 0, scored.err
    assert "note: sub-folders are numbers, read as text" in scored.err
    pairs = labels_in(toy / "s.csv")
    assert len(pairs) == 48
    assert all(label == predicted for label, predicted in pairs)
    extracted = oodcli("extract", *net, "-o", toy / "f.h5", "--json")
    assert extracted.status == 0, extracted.err
    assert json.loads(extracted.out)["accuracy"] == 1
    assert "right on 100.00% of a sample of 48" in extracted.err
    named = ("--class-names", ",".join(PLAIN))
    scored = oodcli("score", *net, *named, "-d", "msp", "-o", toy / "n.csv")
    assert scored.status == 0, scored.err
    assert sum(a == b for a, b in labels_in(toy / "n.csv")) == 8
    assert "sample" not in scored.err


def test_shards_agree_on_the_labels(toy):
    net = (toy / "net.pt", toy / "images", "--arch", f"{toy}/net.py:net", *MODEL, "-d", "msp")
    for shard in (1, 2):
        words = ("--shard", f"{shard}/2", "--batch-size", 5, "-o", toy / f"{shard}.csv")
        result = oodcli("score", *net, *words)
        assert result.status == 0, result.err
        assert "sample of 48 images" in result.err
    result = oodcli("merge", toy / "1.csv", toy / "2.csv", "-o", toy / "s.csv")
    assert result.status == 0, result.err
    assert all(label == predicted for label, predicted in labels_in(toy / "s.csv"))
