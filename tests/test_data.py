"""IDX files, published data sets, subsets, planted features."""
import gzip
import math
import struct
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from superposition_lc import data as module
from superposition_lc.data import load_dataset, planted_activations, read_idx


def idx(array, code=8):
    "The array as the bytes of an IDX file."
    return bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    "A path to write to; hypothesis runs many examples on one."
    return tmp_path_factory.mktemp("idx") / "a file.gz"


# --- IDX

@pytest.mark.parametrize("code, dtype", [(8, "u1"), (9, "i1"), (11, ">i2"), (12, ">i4"), (13, ">f4"), (14, ">f8")])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_types(file, code, dtype, pack):
    array = np.array([[1, -2, 3], [100, 5, 6]]).astype(dtype)
    file.write_bytes(pack(idx(array, code)))
    found = read_idx(file)
    assert found.tolist() == array.tolist() and found.element_size() == array.itemsize
    found += 1  # it can be written to


def test_idx_without_items(file):
    file.write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    assert read_idx(file).shape == (0, 28, 28)


def test_idx_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_idx(tmp_path / "nothing")


@given(cut=st.integers(0, len(idx(IMAGES)) - 1), packed=st.booleans())
def test_idx_cut_short(file, cut, packed):
    whole = idx(IMAGES)
    file.write_bytes(gzip.compress(whole[:cut]) if packed else whole[:cut])
    with pytest.raises(ValueError, match="a file.gz: found .*, expected .*Fix: fetch the file again"):
        read_idx(file)


@given(cut=st.integers(2, len(gzip.compress(idx(IMAGES))) - 1))
def test_gzip_cut_short(file, cut):
    file.write_bytes(gzip.compress(idx(IMAGES))[:cut])
    with pytest.raises(ValueError, match="a file.gz: found a damaged gzip stream"):
        read_idx(file)


@given(at=st.integers(10, len(gzip.compress(idx(IMAGES))) - 1), bit=st.integers(0, 7))
def test_gzip_with_one_bit_flipped(file, at, bit):
    raw = bytearray(gzip.compress(idx(IMAGES)))
    raw[at] ^= 1 << bit
    file.write_bytes(raw)
    try:
        assert read_idx(file).tolist() == IMAGES.tolist()  # a bit that means nothing
    except ValueError as e:
        assert "a file.gz" in str(e)


@given(raw=st.binary(max_size=64), start=st.sampled_from([b"", b"\0\0\x08\x03", b"\0\0\x0d\x01", b"\x1f\x8b", b"\x1f\x8b\x08\0"]))
def test_idx_any_bytes(file, raw, start):
    "Whatever the bytes: an array that accounts for all of them, or a ValueError."
    file.write_bytes(start + raw)
    try:
        found = read_idx(file)
    except ValueError as e:
        assert "a file.gz" in str(e)
    else:
        assert found.numel() * found.element_size() + 4 + 4 * found.ndim == len(start + raw)


@pytest.mark.parametrize("header", ["00000803ffffffffffffffffffffffff", "000008ff" + "00000001" * 255, "00000800", "00000a01"])
def test_idx_absurd_header(file, header):
    file.write_bytes(bytes.fromhex(header))
    with pytest.raises(ValueError):
        read_idx(file)


def test_idx_too_long(file):
    file.write_bytes(idx(IMAGES) + b"\0")
    with pytest.raises(ValueError, match="found 25 bytes of data, expected 24"):
        read_idx(file)


# --- data sets

@pytest.fixture(scope="module")
def digits():
    return load_dataset()


def test_digits(digits):
    from sklearn.datasets import load_digits
    assert digits.name == "digits" and digits.n_classes == 10
    for x, y in [(digits.x_train, digits.y_train), (digits.x_test, digits.y_test)]:
        assert x.dtype == torch.float32 and y.dtype == torch.int64 and x.shape == (len(y), 1, 8, 8)
        assert x.min() == 0 and x.max() == 1
        assert torch.equal(x * 16, (x * 16).round())
    rows = torch.cat([digits.x_train, digits.x_test]).flatten(1).mul(16).tolist()
    assert sorted(rows) == sorted(load_digits().data.tolist())  # every image once
    share = digits.y_train.bincount() / (digits.y_train.bincount() + digits.y_test.bincount())
    assert (share - 0.75).abs().max() < 0.01


def test_split_does_not_depend_on_seed(digits):
    test_images = {tuple(x) for x in digits.x_test.flatten(1).tolist()}
    assert torch.equal(load_dataset(seed=7).x_train, digits.x_train)
    part = load_dataset(n_train=500, n_test=100, seed=7)
    assert {tuple(x) for x in part.x_test.flatten(1).tolist()} <= test_images
    assert not {tuple(x) for x in part.x_train.flatten(1).tolist()} & test_images


def test_subsets(digits):
    small, large = load_dataset(n_classes=4, n_train=50, n_test=20), load_dataset(n_classes=4, n_train=200, n_test=20)
    assert len(small.x_train) == 50 and len(large.x_train) == 200 and len(small.x_test) == 20
    assert torch.equal(small.x_train, large.x_train[:50])  # a larger subset contains the smaller
    assert torch.equal(small.x_train, load_dataset(n_classes=4, n_train=50).x_train)
    assert not torch.equal(small.x_train, load_dataset(n_classes=4, n_train=50, seed=1).x_train)
    assert not torch.equal(small.x_train, digits.x_train[digits.y_train < 4][:50])  # not the first ones
    assert len({tuple(x) for x in large.x_train.flatten(1).tolist()}) == 200  # no image twice
    known = {(tuple(x), y) for x, y in zip(digits.x_train.flatten(1).tolist(), digits.y_train.tolist())}
    assert {(tuple(x), y) for x, y in zip(large.x_train.flatten(1).tolist(), large.y_train.tolist())} <= known  # labels go along


@pytest.mark.parametrize("k", [1, 2, 10])
def test_classes(digits, k):
    part = load_dataset(n_classes=k)
    assert part.y_train.unique().tolist() == list(range(k))
    assert torch.equal(part.x_test, digits.x_test[digits.y_test < k])


def test_loading_leaves_random_numbers_alone():
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    load_dataset(n_train=10)
    planted_activations(5, 3, 10)
    assert torch.equal(state, torch.get_rng_state()) and (numpy_state == np.random.get_state()[1]).all()


@pytest.mark.parametrize("bad, says", [
    (dict(n_classes=11), "n_classes=11: must be 1 to 10"), (dict(n_classes=0), "n_classes"),
    (dict(n_train=0), "n_train=0"), (dict(n_test=451), "n_test=451: must be 1 to 450"), (dict(n_train=-1), "n_train")])
def test_bad_subset(bad, says):
    with pytest.raises(ValueError, match=says):
        load_dataset(**bad)


@pytest.mark.parametrize("name, says", [("mnits", "did you mean 'mnist'"), ("FashionMNIST", "did you mean 'fashion_mnist'"),
                                        ("imagenet", "Known: digits, mnist, fashion_mnist"), (None, "Known"), (3, "Known")])
def test_unknown_name(name, says):
    with pytest.raises(ValueError, match=says):
        load_dataset(name)


@pytest.mark.parametrize("name, mean, std, first", [("mnist", .1307, .3081, [5, 0, 4, 1, 9]), ("fashion_mnist", .2860, .3530, [9, 0, 0, 3, 0])])
def test_published(data_root, monkeypatch, name, mean, std, first):
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(data_root))
    full = load_dataset(name)
    assert full.x_train.shape == (60_000, 1, 28, 28) and full.x_test.shape == (10_000, 1, 28, 28)
    assert full.x_train.dtype == torch.float32 and full.x_train.min() == 0 and full.x_train.max() == 1
    assert full.x_train.mean().item() == pytest.approx(mean, abs=1e-4) and full.x_train.std().item() == pytest.approx(std, abs=1e-4)
    assert full.y_train[:5].tolist() == first  # in the order published, labels with their images
    part = load_dataset(name, n_classes=2, n_train=1000, n_test=100, seed=3)
    assert part.x_train.shape == (1000, 1, 28, 28) and part.y_train.unique().tolist() == [0, 1]


def test_folder_without_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz is missing. Fix: .*unset SUPERPOSITION_LC_DATA"):
        load_dataset("mnist")


def test_folder_with_another_file(tmp_path, monkeypatch):
    "Well-formed, but not what was published."
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    for file in module._FILES:
        (tmp_path / "mnist" / file).write_bytes(gzip.compress(idx(IMAGES)))
    with pytest.raises(ValueError, match="found sha256 [0-9a-f]{64}, expected 440fcabf.*not the published file"):
        load_dataset("mnist")


# --- downloads, from a server on this machine

class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A tiny 'mnist' on two mirrors, of which the first serves wrong files; the cache is a temporary folder."
    import hashlib
    files = {f: gzip.compress(idx(a), mtime=0) for f, a in zip(module._FILES, [IMAGES, np.array([0, 1], np.uint8)] * 2)}
    for mirror in ("wrong", "right"):
        (tmp_path / mirror).mkdir()
        for name, raw in files.items():
            (tmp_path / mirror / name).write_bytes(raw if mirror == "right" else b"<html>moved</html>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.delenv("SUPERPOSITION_LC_DATA", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.setitem(module._SHA256, "mnist", tuple(hashlib.sha256(files[f]).hexdigest() for f in module._FILES))
    monkeypatch.setitem(module._MIRRORS, "mnist", (f"{base}/missing/", f"{base}/wrong/", f"{base}/right/"))
    yield tmp_path
    server.shutdown()
    server.server_close()
    thread.join()


def test_download_tries_the_next_mirror(tiny, monkeypatch):
    data = load_dataset("mnist", progress=False)
    assert data.x_train.shape == (2, 1, 3, 4) and data.y_test.tolist() == [0, 1]
    monkeypatch.setitem(module._MIRRORS, "mnist", ())  # from here on only the cache is left
    with pytest.raises(OSError, match="could not download train-images-idx3-ubyte.gz of mnist. Fix: .*SUPERPOSITION_LC_DATA"):
        load_dataset("mnist", progress=False)


def test_second_load_reads_the_cache(tiny, monkeypatch):
    load_dataset("mnist", progress=False)
    for mirror in ("wrong", "right"):
        for file in (tiny / mirror).iterdir():
            file.unlink()
    assert len(load_dataset("mnist", progress=False).x_train) == 2


def test_damaged_cache_is_fetched_again(tiny):
    load_dataset("mnist", progress=False)
    (tiny / "cache" / "superposition_lc" / "mnist" / module._FILES[0]).write_bytes(b"half a file")
    assert len(load_dataset("mnist", progress=False).x_train) == 2


def test_no_mirror_works(tiny, monkeypatch):
    monkeypatch.setitem(module._MIRRORS, "mnist", module._MIRRORS["mnist"][:2])
    with pytest.raises(OSError, match="could not download") as e:
        load_dataset("mnist", progress=False)
    assert "missing" in str(e.value) and "wrong" in str(e.value)  # both reasons


# --- planted features

@pytest.mark.parametrize("power", [0., 1., 3.])
def test_planted_truth(power):
    p = planted_activations(40, 10, 60_000, activity=0.1, power=power)
    assert p.shares.dtype == torch.float64 and p.shares.sum().item() == pytest.approx(1)
    fires = (p.features > 0).double().mean(0)
    assert fires.mean().item() == pytest.approx(0.1, abs=2e-3)
    assert fires.max() < 0.91
    counted = p.features.double().mean(0) / p.features.double().mean(0).sum()
    assert (counted - p.shares).abs().max() < 5e-3
    truth = -(p.shares * p.shares.log()).sum()
    assert p.effective_features == pytest.approx(math.exp(truth))
    assert (p.shares.diff() <= 0).all()  # common ones first
    strengths = p.features[p.features > 0]
    assert strengths.mean().item() == pytest.approx(0.5, abs=0.01) and strengths.max() < 1


@given(k=st.integers(1, 200), activity=st.floats(1e-4, 0.9), power=st.floats(0, 6))
def test_firing_probabilities(k, activity, power):
    p = module._firing_probabilities(k, activity, power)
    assert p.mean().item() == pytest.approx(activity) and p.max() <= 0.9 + 1e-12 and p.min() >= 0
    assert (p.diff() <= 1e-12).all()


def test_error_of_counted_usage_falls_as_it_should():
    "A hundred times the samples: a tenth of the error, give or take."
    def error(n):
        errors = []
        for seed in range(5):
            p = planted_activations(20, 5, n, activity=0.2, power=1, seed=seed)
            u = p.features.double().mean(0)
            errors.append((u / u.sum() - p.shares).norm())
        return torch.stack(errors).mean()
    assert error(100) / error(10_000) == pytest.approx(10, rel=0.5)


def test_planted_geometry():
    p = planted_activations(30, 12, 500)
    assert p.activations.shape == (500, 12) and p.features.shape == (500, 30) and p.directions.shape == (30, 12)
    assert p.activations.dtype == p.features.dtype == p.directions.dtype == torch.float32
    assert torch.allclose(p.directions.norm(dim=1), torch.ones(30))
    assert torch.allclose(p.activations, p.features @ p.directions, atol=1e-6)


def test_planted_noise_is_added_to_the_same_features():
    clean, noisy = planted_activations(30, 12, 5000), planted_activations(30, 12, 5000, noise=0.1)
    assert torch.equal(clean.features, noisy.features) and torch.equal(clean.directions, noisy.directions)
    assert (noisy.activations - clean.activations).std().item() == pytest.approx(0.1, rel=0.02)


def test_planted_seed():
    a, b, c = (planted_activations(30, 12, 50, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.activations, b.activations) and not torch.equal(a.directions, c.directions)


@pytest.mark.parametrize("k, n", [(1, 1), (5, 8), (8, 8)])
def test_orthogonal_directions(k, n):
    p = planted_activations(k, n, 100, directions="orthogonal")
    assert torch.allclose(p.directions @ p.directions.T, torch.eye(k), atol=1e-6)
    assert torch.equal(p.features, planted_activations(k, n, 100).features)  # the same features, along other directions


@pytest.mark.parametrize("group, correlation", [(2, .9), (3, .5), (6, .1), (6, .99)])
def test_correlated_directions(group, correlation):
    "The cosine is exact within a group, and by chance between groups."
    p = planted_activations(60, 6, 100, directions="correlated", correlation=correlation, group=group)
    cosines = (p.directions @ p.directions.T).view(60 // group, group, 60 // group, group)
    within = torch.stack([cosines[i, :, i] for i in range(60 // group)])
    assert torch.allclose(within, torch.full((group, group), correlation).fill_diagonal_(1.).expand_as(within), atol=1e-5)
    between = torch.cat([cosines[i, :, j].flatten() for i in range(60 // group) for j in range(i)])
    assert between.mean().abs() < .25 and between.abs().max() < 1 and between.std() > .2
    assert p.effective_features == pytest.approx(60)


HARD = [dict(cooccurrence=.3), dict(cooccurrence=1., group=2), dict(cooccurrence=.5, power=1.), dict(hierarchy=.5), dict(hierarchy=.1, power=1.),
        dict(hierarchy=.9, group=8, activity=.3), dict(directions="correlated", correlation=.6, hierarchy=.5)]


@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_cases_keep_their_usage(case):
    "Each feature fires as often as its share says, the mean is `activity`, and the F counted on the samples is the F stated."
    activity = case.get("activity", .1)
    p = planted_activations(16, 8, 60_000, **{"activity": .1, **case})
    fires = (p.features > 0).double().mean(0)
    expected = p.shares * 16 * activity
    assert expected.mean().item() == pytest.approx(activity)
    assert ((fires - expected).abs() < 5 * (expected * (1 - expected) / 60_000).sqrt()).all()
    counted = p.features.double().mean(0) / p.features.double().mean(0).sum()
    assert torch.special.entr(counted).sum().exp().item() == pytest.approx(p.effective_features, rel=.01)


@pytest.mark.parametrize("c", [0., .2, .8, 1.])
def test_cooccurrence_is_the_correlation_of_firing(c):
    p = planted_activations(12, 8, 60_000, activity=.1, cooccurrence=c, group=3)
    r = torch.corrcoef((p.features > 0).double().T)
    for i in range(12):
        for j in range(i):
            assert r[i, j].item() == pytest.approx(c if i // 3 == j // 3 else 0, abs=.03)
    strengths = p.features[(p.features[:, :2] > 0).all(1), :2] if c else p.features[:, :2]
    assert torch.corrcoef(strengths.T)[0, 1].abs() < .05  # they fire together, each with a strength of its own


@pytest.mark.parametrize("h, power", [(.2, 0.), (.7, 1.)])
def test_children_fire_only_with_their_parent(h, power):
    p = planted_activations(15, 8, 60_000, activity=.1, hierarchy=h, group=5, power=power)
    fires = (p.features > 0).view(-1, 3, 5)
    parent, children = fires[..., :1], fires[..., 1:]
    assert not (children & ~parent).any()
    for g in range(3):
        rate = children[:, g][parent[:, g, 0]].double().mean(0)
        assert (rate - h).abs().max() < 5 * math.sqrt(h * (1 - h) / parent[:, g].sum().item())
    together = (children[:, 0, 0] & children[:, 0, 1])[parent[:, 0, 0]].double().mean().item()
    assert together == pytest.approx(h * h, abs=.03)  # children of one parent are independent
    assert p.shares.view(3, 5)[:, 1:].numpy() == pytest.approx(h * p.shares.view(3, 5)[:, :1].expand(3, 4).numpy())
    assert p.shares[0] / p.shares[5] == pytest.approx(2**power)  # the power law is that of the parents


@pytest.mark.parametrize("noise", [0., .2])
def test_outlier_is_a_constant_of_one_neuron(noise):
    plain, p = (planted_activations(16, 8, 5000, noise=noise, outlier=o) for o in (0, -7.5))
    shift = p.activations - plain.activations
    assert torch.equal(p.features, plain.features) and (shift[:, 1:] == 0).all() and shift[:, 0].std() < 1e-5
    typical = plain.activations.var(0, correction=0).mean().sqrt()
    assert (shift[:, 0] / typical).mean().item() == pytest.approx(-7.5, rel=1e-5)
    assert p.effective_features == plain.effective_features
    assert planted_activations(3, 2, 1, outlier=5.).activations.isfinite().all()  # one sample has no spread


def test_defaults_of_planted_activations_draw_what_they_always_drew():
    "Figures quoted elsewhere rest on these numbers."
    p = planted_activations(64, 32, 200, noise=.1, power=1, seed=3)
    g = torch.Generator().manual_seed(2**31 + 3)
    directions = torch.nn.functional.normalize(torch.randn(64, 32, generator=g), dim=1)
    probabilities = module._firing_probabilities(64, .05, 1)
    features = (torch.rand(200, 64, generator=g) < probabilities.float()) * torch.rand(200, 64, generator=g)
    assert torch.equal(p.directions, directions) and torch.equal(p.features, features)
    assert torch.equal(p.activations, features @ directions + .1 * torch.randn(200, 32, generator=g))


@pytest.mark.parametrize("bad", [dict(n_features=0), dict(n_neurons=0), dict(n_samples=-1), dict(activity=0.), dict(activity=0.95),
                                 dict(activity=math.nan), dict(power=-1.), dict(power=math.inf), dict(noise=-0.1), dict(noise=math.nan),
                                 dict(directions="sparse"), dict(n_features=4, directions="orthogonal"), dict(correlation=.5), dict(correlation=1., directions="correlated"),
                                 dict(correlation=0., directions="correlated"), dict(group=1, hierarchy=.5), dict(group=4, hierarchy=.5), dict(group=4, cooccurrence=.5),
                                 dict(group=6, directions="correlated", correlation=.5), dict(hierarchy=1.), dict(hierarchy=-.1), dict(hierarchy=math.nan),
                                 dict(cooccurrence=1.1), dict(cooccurrence=math.nan), dict(cooccurrence=.5, hierarchy=.5), dict(outlier=math.inf),
                                 dict(activity=.6, hierarchy=.1, group=3)], ids=str)
def test_planted_bad_arguments(bad):
    name = next(iter(bad))
    with pytest.raises(ValueError, match=f"{name}="):
        planted_activations(**{**dict(n_features=6, n_neurons=3, n_samples=10), **bad})


# --- CIFAR-10

def cifar_archive(folder, n=3):
    "An archive of the published form with n records a batch: (path, labels, pixels as (6, n, 3, 32, 32))."
    import io
    import tarfile
    g = np.random.default_rng(0)
    records = g.integers(0, 256, (6, n, 3073), dtype=np.uint8)
    records[..., 0] %= 10
    path = folder / "cifar10" / "cifar-10-binary.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], records):
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = part.size
            archive.addfile(info, io.BytesIO(part.tobytes()))
    return path, records[..., 0], records[..., 1:].reshape(6, n, 3, 32, 32)


def test_cifar10(tmp_path, monkeypatch):
    "Labels and pixels where the format says, in colour, in [0, 1]; a file that is not the published one is refused."
    import pooch
    path, labels, pixels = cifar_archive(tmp_path)
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="not the published file"):
        load_dataset("cifar10")
    monkeypatch.setattr(module, "_CIFAR10_SHA256", pooch.file_hash(str(path)))
    d = load_dataset("cifar10")
    assert d.x_train.shape == (15, 3, 32, 32) and d.x_test.shape == (3, 3, 32, 32) and d.x_train.dtype == torch.float32 and d.y_train.dtype == torch.int64
    assert d.y_train.tolist() == labels[:5].ravel().tolist() and d.y_test.tolist() == labels[5].tolist()
    assert np.array_equal((d.x_train * 255).round().numpy().astype(np.uint8), pixels[:5].reshape(15, 3, 32, 32))


def test_cifar10_that_is_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"cifar-10-binary.tar.gz is missing. Fix: download https://\S+cifar-10-binary.tar.gz \(162 MB\) and put it there"):
        load_dataset("cifar10")


def pixels_of(images): return (images * 255).round().to(torch.uint8).numpy()


def test_cifar10_4000_from_either_file_is_the_same(tmp_path, monkeypatch):
    "From a file of just these images, and without it from the archive: the first 3,200 are to train on, the next 800 to test on."
    import pooch
    path, labels, pixels = cifar_archive(tmp_path, n=801)  # the 4,000 are in five batches here
    labels, pixels = labels[:5].ravel()[:4000], pixels[:5].reshape(-1, 3, 32, 32)[:4000]
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    monkeypatch.setattr(module, "_CIFAR10_SHA256", pooch.file_hash(str(path)))
    archived = load_dataset("cifar10_4000")
    assert archived.y_train.tolist() == labels[:3200].tolist() and archived.y_test.tolist() == labels[3200:].tolist()
    assert np.array_equal(pixels_of(archived.x_train), pixels[:3200]) and np.array_equal(pixels_of(archived.x_test), pixels[3200:])
    path.unlink()
    small = path.parent / "cifar10_lossless_4000.npz"
    np.savez(small, x=pixels.transpose(0, 2, 3, 1), y=labels)
    with pytest.raises(ValueError, match="cifar10_lossless_4000.npz: found sha256 .* not the published file. Fix: remove it"):
        load_dataset("cifar10_4000")
    monkeypatch.setattr(module, "_CIFAR10_4000_SHA256", pooch.file_hash(str(small)))
    found = load_dataset("cifar10_4000")
    for part in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(found, part), getattr(archived, part)) and getattr(found, part).is_contiguous(), part


def test_cifar10_4000_that_is_missing_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERPOSITION_LC_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cifar-10-binary.tar.gz is missing. Fix: download"):
        load_dataset("cifar10_4000")


def test_cifar10_4000_holds_the_published_images(data_root):
    "Labels and corner pixels of the official file, all images different."
    if not (data_root / "cifar10/cifar10_lossless_4000.npz").is_file():
        pytest.skip("the data folder has no cifar10/cifar10_lossless_4000.npz: the test on real CIFAR-10 images does not run")
    d = load_dataset("cifar10_4000")
    assert (d.x_train.shape, d.x_test.shape, d.n_classes) == ((3200, 3, 32, 32), (800, 3, 32, 32), 10)
    assert d.y_train[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3] and d.y_train.bincount().tolist() == [319, 302, 337, 308, 328, 312, 330, 314, 327, 323]
    x = pixels_of(torch.cat([d.x_train, d.x_test]))
    assert x[0, :, 0, 0].tolist() == [59, 62, 63] and x[0, :, -1, -1].tolist() == [123, 92, 72]
    assert len(np.unique(x.reshape(4000, -1), axis=0)) == 4000
