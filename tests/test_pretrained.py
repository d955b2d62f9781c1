"""Other people's autoencoders: every format against its formula, folded norms, files that lie or attack, and the way back."""
import json
import math
import pickle
import sys
import types
import warnings
import zipfile

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from superposition_lc.entropy import ShareAccumulator, effective_features, feature_shares
from superposition_lc.pretrained import PretrainedSAE, export_sae, load_sae
from superposition_lc.sae import SAEConfig, SparseAutoencoder, sae_quality, train_sae

F64 = torch.float64
N, D, K = 5, 9, 3


def close(found, expected, tolerance=1e-6):
    assert_close(found, expected, rtol=tolerance, atol=tolerance)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- dictionary_learning: files made by hand, and its formulas as plain functions

def linear(n, d, seed, **more):
    state = {"encoder.weight": normal(d, n, seed=seed), "encoder.bias": normal(d, seed=seed + 1), "decoder.weight": normal(n, d, seed=seed + 2)}
    return state | {key: normal(size, seed=seed + 3 + i) for i, (key, size) in enumerate(more.items())}


def matrix(n, d, seed, **more):
    state = {"W_enc": normal(n, d, seed=seed), "b_enc": normal(d, seed=seed + 1), "W_dec": normal(d, n, seed=seed + 2), "b_dec": normal(n, seed=seed + 3)}
    return state | more


def dictionary(name, n=N, d=D, k=K, seed=0):
    "State dict of a class, all numbers random."
    k, threshold = torch.tensor(k, dtype=torch.int), normal(1, seed=seed + 9).abs()[0]
    if name == "AutoEncoder":
        return linear(n, d, seed, bias=n)
    if name == "AutoEncoderNew":
        return linear(n, d, seed, **{"decoder.bias": n})
    if name == "GatedAutoEncoder":
        state = linear(n, d, seed, decoder_bias=n, r_mag=d, gate_bias=d, mag_bias=d)
        return {key: t for key, t in state.items() if key != "encoder.bias"}
    if name == "JumpReluAutoEncoder":
        return matrix(n, d, seed, threshold=normal(d, seed=seed + 8))
    if name == "AutoEncoderTopK":
        return linear(n, d, seed, b_dec=n) | {"k": k, "threshold": threshold}
    if name == "BatchTopKSAE":
        return linear(n, d, seed, b_dec=n) | {"k": k, "threshold": threshold}
    return matrix(n, d, seed, threshold=threshold, k=k, group_sizes=torch.tensor([1, d - 1]))


def keep_largest(z, k):
    out = torch.zeros_like(z)
    for row, codes in zip(out, z):
        for i in sorted(range(len(codes)), key=lambda j: -codes[j].item())[:k]:
            row[i] = codes[i]
    return out


def dictionary_formula(name, s, x):
    "(codes, reconstruction) of rows x."
    if name == "AutoEncoder":
        z = torch.clamp((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"], min=0)
        return z, z @ s["decoder.weight"].T + s["bias"]
    if name == "AutoEncoderNew":
        z = torch.clamp(x @ s["encoder.weight"].T + s["encoder.bias"], min=0)
        return z, z @ s["decoder.weight"].T + s["decoder.bias"]
    if name == "GatedAutoEncoder":
        u = (x - s["decoder_bias"]) @ s["encoder.weight"].T
        z = (u + s["gate_bias"] > 0).double() * torch.clamp(torch.exp(s["r_mag"]) * u + s["mag_bias"], min=0)
        return z, z @ s["decoder.weight"].T + s["decoder_bias"]
    if name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        pre = (x if name == "JumpReluAutoEncoder" else x - s["b_dec"]) @ s["W_enc"] + s["b_enc"]
        z = torch.clamp(pre, min=0) * (pre > s["threshold"])
        return z, z @ s["W_dec"] + s["b_dec"]
    z = torch.clamp((x - s["b_dec"]) @ s["encoder.weight"].T + s["encoder.bias"], min=0)
    z = keep_largest(z, s["k"].item()) if name == "AutoEncoderTopK" else z * (z > s["threshold"])
    return z, z @ s["decoder.weight"].T + s["b_dec"]


CLASSES = ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"]


def write_dictionary(folder, name, state, n=N, d=D, **trainer):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": n, "dict_size": d, "lm_name": "EleutherAI/pythia-70m-deduped", "layer": 3} | trainer
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"d_submodule": n}}))
    return folder


sizes = dict(n=st.integers(2, 6), d=st.integers(2, 9), k=st.integers(1, 9), seed=st.integers(0, 2**31))


@settings(max_examples=100)
@given(name=st.sampled_from(CLASSES), **sizes)
def test_every_class_of_dictionary_learning_follows_its_formula(name, n, d, k, seed, tmp_path_factory):
    k = min(k, d)
    state, x = dictionary(name, n, d, k, seed), 2 * normal(7, n, seed=seed + 20)
    folder = write_dictionary(tmp_path_factory.mktemp("sae"), name, state, n, d, **({"k": k} if "TopK" in name else {}))
    z, x_hat = dictionary_formula(name, state, x)
    sae = load_sae(folder, fold_norms=False, dtype=F64)
    close(sae.encode(x), z)
    close(sae.decode(z), x_hat)
    close(sae(x)[0], x_hat)
    assert (sae.n_neurons, sae.n_features) == (n, d)


# --- SAELens

ARCHITECTURES = ["standard", "jumprelu", "topk", "gated"]
NORMALISE = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]


def lens(name, n=N, d=D, seed=0):
    "Tensors of an architecture, all numbers random."
    state = matrix(n, d, seed)
    if name == "jumprelu":
        state["threshold"] = normal(d, seed=seed + 8)
    if name == "gated":
        del state["b_enc"]
        state |= {key: normal(d, seed=seed + 10 + i) for i, key in enumerate(("b_gate", "b_mag", "r_mag"))}
    return state


def lens_formula(cfg, s, x, factor=None):
    "(codes, reconstruction) of rows x, with the settings in the words of version 6; factor: fold_activation_norm_scaling_factor."
    name, normalise = cfg["architecture"], cfg["normalize_activations"]
    W_enc, W_dec, b_dec = s["W_enc"], s["W_dec"], s["b_dec"]
    if normalise == "expected_average_only_in":
        W_enc, W_dec, b_dec = W_enc * factor, W_dec / factor, b_dec / factor
    back, u = (lambda y: y), x
    if normalise == "layer_norm":
        mean = x.sum(1, keepdim=True) / x.shape[1]
        std = ((x - mean) ** 2).sum(1, keepdim=True).div(x.shape[1] - 1).sqrt()
        u, back = (x - mean) / (std + 1e-5), lambda y: y * std + mean
    if normalise == "constant_norm_rescale":
        coefficient = math.sqrt(x.shape[1]) / (x ** 2).sum(1, keepdim=True).sqrt()
        u, back = x * coefficient, lambda y: y / coefficient
    if cfg["apply_b_dec_to_input"]:
        u = u - b_dec
    if name == "gated":
        z = (u @ W_enc + s["b_gate"] > 0).double() * torch.clamp(u @ (W_enc * s["r_mag"].exp()) + s["b_mag"], min=0)
        return z, back(z @ W_dec + b_dec)
    pre = u @ W_enc + s["b_enc"]
    if name == "standard":
        z = torch.clamp(pre, min=0)
    if name == "jumprelu":
        z = torch.clamp(pre, min=0) * (pre > s["threshold"]).double()
    if name == "topk":
        norms = (W_dec ** 2).sum(1).sqrt()
        rescale = cfg.get("rescale_acts_by_decoder_norm", False)
        z = torch.clamp(keep_largest(pre * norms if rescale else pre, cfg["k"]), min=0)
        return z, back((z / norms if rescale else z) @ W_dec + b_dec)
    return z, back(z @ W_dec + b_dec)


def write_lens(folder, state, cfg):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: t.contiguous() for key, t in state.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def lens_cfg(name, normalise="none", centred=True, n=N, d=D, k=K, rescale=False):
    cfg = dict(architecture=name, d_in=n, d_sae=d, dtype="float64", device="cuda", apply_b_dec_to_input=centred, normalize_activations=normalise,
               reshape_activations="none", metadata={"sae_lens_version": "6.2.0", "model_name": "pythia-70m-deduped", "hook_name": "blocks.3.hook_mlp_out"})
    return cfg | (dict(k=k, rescale_acts_by_decoder_norm=rescale) if name == "topk" else {})


def old_cfg(cfg):
    "The same in the words of the versions before 6.0."
    old = {key: v for key, v in cfg.items() if key not in ("metadata", "k", "rescale_acts_by_decoder_norm")}
    old |= dict(hook_point="blocks.3.hook_mlp_out", model_name="pythia-70m-deduped", activation_fn_str="relu", activation_fn_kwargs={})
    if cfg["architecture"] == "standard":
        del old["architecture"]
    if cfg["architecture"] == "topk":
        old |= dict(architecture="standard", activation_fn_str="topk", activation_fn_kwargs={"k": cfg["k"]})
    old["normalize_activations"] = {"none": False, "expected_average_only_in": True}.get(cfg["normalize_activations"], cfg["normalize_activations"])
    return old


@settings(max_examples=200)
@given(name=st.sampled_from(ARCHITECTURES), normalise=st.sampled_from(NORMALISE), centred=st.booleans(), rescale=st.booleans(), old=st.booleans(), **sizes)
def test_every_architecture_of_saelens_follows_its_formula(name, normalise, centred, rescale, old, n, d, k, seed, tmp_path_factory):
    k, state, x = min(k, d), lens(name, n, d, seed), 2 * normal(7, n, seed=seed + 20) + 1
    cfg = lens_cfg(name, normalise, centred, n, d, k, rescale and not old)
    factor = .3 if normalise == "expected_average_only_in" else None
    folder = write_lens(tmp_path_factory.mktemp("sae"), state, old_cfg(cfg) if old else cfg)
    z, x_hat = lens_formula(cfg, state, x, factor)
    sae = load_sae(folder, fold_norms=False, dtype=F64, norm_scaling_factor=factor)
    close(sae.encode(x), z)
    close(sae.decode(z, x), x_hat)
    close(sae(x)[0], x_hat)
    assert sae.info["site"] == "blocks.3.hook_mlp_out" and sae.info["model"] == "pythia-70m-deduped"


def test_b_dec_is_subtracted_where_the_file_does_not_say(tmp_path):
    state, x = lens("standard"), normal(6, N, seed=5)
    sae = load_sae(write_lens(tmp_path, state, {"d_in": N, "d_sae": D}), fold_norms=False, dtype=F64)
    close(sae.encode(x), lens_formula(lens_cfg("standard"), state, x)[0])


def test_a_scaling_factor_of_ones_is_dropped_and_another_refused(tmp_path):
    state = lens("standard")
    sae = load_sae(write_lens(tmp_path / "one", state | {"scaling_factor": torch.ones(D)}, lens_cfg("standard")), dtype=F64)
    close(sae.weight, state["W_enc"].T)
    with pytest.raises(ValueError, match="scaling_factor"):
        load_sae(write_lens(tmp_path / "two", state | {"scaling_factor": torch.full((D,), 2.)}, lens_cfg("standard")))


def test_silent_samples_stay_finite_where_samples_are_rescaled(tmp_path):
    sae = load_sae(write_lens(tmp_path, lens("standard"), lens_cfg("standard", "constant_norm_rescale")))
    x = torch.zeros(2, N)
    x[1, 0] = 1.
    x_hat, z = sae(x)
    assert z.isfinite().all() and torch.equal(x_hat[0], torch.zeros(N)) and x_hat[1].any()


def test_samples_normalised_one_by_one_cannot_be_decoded_without_them(tmp_path):
    sae = load_sae(write_lens(tmp_path, lens("standard"), lens_cfg("standard", "layer_norm")))
    with pytest.raises(ValueError, match=r"decode\(z, x\)"):
        sae.decode(torch.ones(2, D))


# --- folded norms

def every_kind(k=K, seed=0, n=N, d=D):
    "Arguments of a PretrainedSAE for each kind, and for TopK compared times norms."
    base = dict(weight=normal(d, n, seed=seed), bias=normal(d, seed=seed + 1), decoder=3 * normal(d, n, seed=seed + 2), decoder_bias=normal(n, seed=seed + 3))
    more = dict(relu={}, jumprelu=dict(threshold=normal(d, seed=seed + 4)), topk=dict(k=k), rescaled=dict(k=k, rescaled=True),
                gated=dict(gate_bias=normal(d, seed=seed + 4), r_mag=normal(d, seed=seed + 5)))
    return {name: base | dict(kind="topk" if name == "rescaled" else name, **m) for name, m in more.items()}


KINDS = ["relu", "jumprelu", "topk", "rescaled", "gated"]


@settings(max_examples=100)
@given(kind=st.sampled_from(KINDS), normalise=st.sampled_from(NORMALISE[:3]), seed=st.integers(0, 2**31), k=st.integers(1, D))
def test_folding_changes_codes_by_the_norms_and_nothing_else(kind, normalise, seed, k):
    made, x = every_kind(k, seed)[kind] | dict(normalise=normalise), 2 * normal(8, N, seed=seed + 9)
    raw, folded = PretrainedSAE(**made, fold_norms=False), PretrainedSAE(**made)
    norms = made["decoder"].square().sum(1).sqrt()
    close(folded.norms, norms)
    close(folded.directions.norm(dim=1), torch.ones(D, dtype=F64))
    close(folded.encode(x), raw.encode(x) if kind == "rescaled" else raw.encode(x) * norms)
    assert torch.equal(folded.encode(x) > 0, raw.encode(x) > 0)
    close(folded(x)[0], raw(x)[0])


@settings(max_examples=60)
@given(kind=st.sampled_from(["relu", "jumprelu", "gated"]), seed=st.integers(0, 2**31))
def test_shares_are_those_of_the_unstretched_autoencoder(kind, seed):
    "Stretching decoder rows and shrinking codes to match leaves folded codes as they were."
    made, x = every_kind(seed=seed)[kind], normal(30, N, seed=seed + 9)
    c = normal(D, seed=seed + 7).exp()
    stretched = made | {n: made[n] / c for n in ("bias", "gate_bias", "threshold") if n in made}
    stretched |= dict(weight=made["weight"] / c[:, None], decoder=made["decoder"] * c[:, None])
    close(PretrainedSAE(**stretched).encode(x), PretrainedSAE(**made).encode(x))


def test_topk_chooses_before_norms_are_folded():
    eye, zeros = torch.eye(3), torch.zeros(3)
    rows = torch.diag(torch.tensor([.1, 1., 1.]))
    x = torch.tensor([[3., 2., 1.]])
    close(PretrainedSAE(eye, zeros, rows, zeros, "topk", 1).encode(x), torch.tensor([[.3, 0., 0.]]))
    close(PretrainedSAE(eye, zeros, rows, zeros, "topk", 1, rescaled=True).encode(x), torch.tensor([[0., 2., 0.]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_zeros_counts_for_nothing_and_makes_no_nan(kind):
    made = every_kind()[kind]
    made["decoder"][2] = 0
    sae = PretrainedSAE(**made)
    x_hat, z = sae(normal(40, N, seed=3))
    assert z.isfinite().all() and x_hat.isfinite().all() and not z[:, 2].any()
    assert torch.equal(sae.decode(torch.eye(D, dtype=F64))[2], sae.decoder_bias)


# --- the class

def test_codes_keep_leading_axes():
    sae = PretrainedSAE(**every_kind()["relu"])
    x = normal(2, 3, 4, N)
    close(sae.encode(x), sae.encode(x.view(-1, N)).view(2, 3, 4, D))
    close(sae.decode(sae.encode(x)), sae(x)[0])


@pytest.mark.parametrize("bad", [torch.ones(3, N + 1), torch.ones(3, N, dtype=torch.int64), torch.tensor(1.), [[1.] * N]])
def test_activations_of_the_wrong_shape_are_refused(bad):
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor of shape \(..., 5\)"):
        PretrainedSAE(**every_kind()["relu"]).encode(bad)


@pytest.mark.parametrize("change, message", [
    (dict(kind="lasso"), "kind must be"), (dict(kind="topk"), "k must be an integer"), (dict(kind="topk", k=D + 1), "k must be an integer"),
    (dict(kind="gated"), "gate_bias is missing"), (dict(scale=0.), "scale must be"), (dict(normalise="batch_norm"), "normalise must be"),
    (dict(rescaled=True), "rescaled=True goes with"), (dict(kind="jumprelu"), "threshold is missing"),
    (dict(threshold=torch.ones(D)), "threshold is given, but not used"),
    (dict(decoder=torch.ones(N, D)), r"decoder must have shape \(9, 5\), got \(5, 9\)"),
    (dict(weight=torch.ones(D)), r"weight must have shape \(features, neurons\)")])
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PretrainedSAE(**every_kind()["relu"] | change)


def test_quality_and_shares_of_a_loaded_autoencoder_do_not_depend_on_how_the_stream_is_cut():
    sae, x, clusters = PretrainedSAE(**every_kind()["jumprelu"]), normal(300, N, seed=4), torch.arange(300) // 3
    whole, stream = ShareAccumulator(D), ShareAccumulator(D)
    quality = sae_quality(sae, x, [whole], clusters)
    for i in range(0, 300, 70):
        stream.update(sae.encode(x[i:i + 70]), clusters[i:i + 70])
    z = sae.encode(x)
    assert quality["effective_features"].item() == pytest.approx(effective_features(feature_shares(z)))
    assert quality["l0"].item() == pytest.approx((z > 0).sum(1).double().mean().item())
    assert stream.estimate().value == pytest.approx(whole.estimate().value) and stream.n_clusters == 100


# --- files

def test_half_precision_comes_as_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        state = {key: t.to(dtype) for key, t in dictionary("AutoEncoder").items()}
        sae = load_sae(write_dictionary(tmp_path / str(dtype), "AutoEncoder", state))
        assert {t.dtype for t in sae.state_dict().values()} == {torch.float32}
        close(sae.decoder_bias, state["bias"].float())


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_the_class_is_told_by_the_keys_where_there_is_no_config(name, tmp_path):
    torch.save(dictionary(name), tmp_path / "ae.pt")
    assert load_sae(tmp_path).info["architecture"] == name


def test_topk_and_batch_topk_look_alike_without_a_config(tmp_path):
    state, x = dictionary("AutoEncoderTopK"), normal(5, N, seed=7)
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(ValueError, match="fit AutoEncoderTopK and BatchTopKSAE.*pass architecture="):
        load_sae(tmp_path)
    for name in ("AutoEncoderTopK", "BatchTopKSAE"):
        close(load_sae(tmp_path, architecture=name, fold_norms=False, dtype=F64).encode(x), dictionary_formula(name, state, x)[0])


def test_batch_topk_without_a_learned_threshold_is_refused_with_the_way_out(tmp_path):
    state = dictionary("BatchTopKSAE") | {"threshold": torch.tensor(-1.)}
    folder = write_dictionary(tmp_path, "BatchTopKSAE", state)
    with pytest.raises(ValueError, match="never estimated.*architecture='AutoEncoderTopK'"):
        load_sae(folder)
    assert load_sae(folder, architecture="AutoEncoderTopK").k == K


def test_k_may_stand_in_the_config_only(tmp_path):
    state = {key: t for key, t in dictionary("AutoEncoderTopK").items() if key not in ("k", "threshold")}
    assert load_sae(write_dictionary(tmp_path, "AutoEncoderTopK", state, k=2)).k == 2


def two_layers(folder):
    for i in range(2):
        write_dictionary(folder / f"pythia-70m-deduped/mlp_out_layer{i}/10_32768", "AutoEncoder", dictionary("AutoEncoder", seed=i))
    return folder


def zipped(folder, path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for p in sorted(folder.rglob("*")):
            z.write(p, p.relative_to(folder).as_posix())
    return path


@pytest.mark.parametrize("way", ["folder", "zip"])
@pytest.mark.parametrize("subfolder", ["pythia-70m-deduped/mlp_out_layer1/10_32768", "EleutherAI/pythia-70m-deduped/mlp_out_layer1/10_32768",
                                       "mlp_out_layer1/10_32768", "mlp_out_layer1/10_32768/"])
def test_a_subfolder_is_found_by_its_end_in_a_folder_and_in_a_zip(way, subfolder, tmp_path):
    folder = two_layers(tmp_path / "saes")
    sae = load_sae(folder if way == "folder" else zipped(folder, tmp_path / "saes.zip"), subfolder, dtype=F64)
    close(sae.decoder_bias, dictionary("AutoEncoder", seed=1)["bias"])
    assert sae.info["site"] == 3 and sae.info["model"] == "EleutherAI/pythia-70m-deduped"


def test_saelens_files_are_read_from_a_zip(tmp_path):
    state = lens("gated")
    folder = write_lens(tmp_path / "saes" / "layer", state, lens_cfg("gated"))
    close(load_sae(zipped(folder.parent, tmp_path / "x.zip"), dtype=F64).bias, state["b_mag"])


def test_weights_may_be_named_directly(tmp_path):
    folder = write_dictionary(tmp_path, "AutoEncoderNew", dictionary("AutoEncoderNew"))
    (folder / "ae.pt").rename(folder / "step_1000.pt")
    assert load_sae(str(folder / "step_1000.pt")).info["architecture"] == "AutoEncoderNew"
    with pytest.raises(ValueError, match="subfolder='layer3' goes with a folder"):
        load_sae(folder / "step_1000.pt", "layer3")


def test_what_to_choose_from_is_said(tmp_path):
    folder = two_layers(tmp_path)
    with pytest.raises(ValueError, match="found 2 autoencoders, expected one.*mlp_out_layer0"):
        load_sae(folder)
    with pytest.raises(ValueError, match="found 2 autoencoders in '10_32768'"):
        load_sae(folder, "10_32768")
    with pytest.raises(ValueError, match="found 0 autoencoders in 'mlp_out_layer7/10_32768'.*of 2 such as 'pythia-70m-deduped/mlp_out_layer"):
        load_sae(folder, "mlp_out_layer7/10_32768")


def test_no_zip_writes_outside_or_anywhere(tmp_path):
    "Names that climb out of the archive are only names: nothing is unpacked."
    source = write_dictionary(tmp_path / "source", "AutoEncoder", dictionary("AutoEncoder"))
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    with zipfile.ZipFile(inside / "evil.zip", "w") as z:
        for p in source.iterdir():
            z.write(p, f"../../{p.name}")
    before = sorted(tmp_path.rglob("*"))
    assert load_sae(inside / "evil.zip").n_features == D
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_a_broken_zip_is_named(content, tmp_path):
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(ValueError, match="x.zip is not a readable zip"):
        load_sae(tmp_path / "x.zip")


def test_a_zip_with_a_damaged_member_is_named(tmp_path):
    path = zipped(write_dictionary(tmp_path / "saes", "AutoEncoder", dictionary("AutoEncoder")), tmp_path / "x.zip")
    with zipfile.ZipFile(path) as z:
        start = z.getinfo("ae.pt").header_offset + 30 + len("ae.pt")
    content = bytearray(path.read_bytes())
    content[start + 20:start + 60] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.zip is not a readable zip"):
        load_sae(path)


class Hostile:
    "Creates a file when it is unpickled without care."
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("way", ["torch", "pickle", "zip"])
def test_a_hostile_pickle_is_refused_and_does_not_run(way, tmp_path):
    trap, folder = tmp_path / "trapped", tmp_path / "sae"
    state = dictionary("AutoEncoder") | {"bias": Hostile(trap)}
    write_dictionary(folder, "AutoEncoder", state)
    if way == "pickle":
        (folder / "ae.pt").write_bytes(pickle.dumps({"bias": Hostile(trap)}))
    source = zipped(folder, tmp_path / "x.zip") if way == "zip" else folder
    with pytest.raises(ValueError, match="ae.pt: found no plain tensors.*nothing in it was run"):
        load_sae(source)
    assert not trap.exists()
    if way != "pickle":  # the trap works
        torch.load(folder / "ae.pt", weights_only=False)["bias"].close()
        assert trap.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1, 2])])
@pytest.mark.parametrize("name", ["ae.pt", "sae_weights.safetensors"])
def test_a_file_without_tensors_is_refused(name, content, tmp_path):
    (tmp_path / "cfg.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: found"):
        load_sae(tmp_path)


def test_something_else_than_tensors_by_name_is_refused(tmp_path):
    for i, wrong in enumerate([[torch.ones(2)], {"bias": 1.}, {1: torch.ones(2)}, torch.ones(3)]):
        (tmp_path / str(i)).mkdir()
        torch.save(wrong, tmp_path / str(i) / "ae.pt")
        with pytest.raises(ValueError, match="expected a dictionary of tensors by name"):
            load_sae(tmp_path / str(i))


@pytest.mark.parametrize("change, message", [
    ({"bias": None}, r"found the keys \['decoder.weight'.*missing bias"),
    ({"extra": torch.ones(1)}, "unknown extra"),
    ({"bias": normal(N + 1)}, r"bias has shape \(6,\), expected \(5,\) for 5 neurons and 9 features"),
    ({"encoder.weight": normal(N, D)}, r"encoder.weight has shape \(5, 9\), expected \(9, 5\)"),
    ({"decoder.weight": normal(D, N)}, r"decoder.weight has shape \(9, 5\), expected \(5, 9\)"),
    ({"encoder.weight": normal(N)}, r"encoder.weight has shape \(5,\), expected a matrix"),
    ({"encoder.bias": torch.ones(D, dtype=torch.int64)}, "encoder.bias holds torch.int64"),
    ({"encoder.bias": torch.full((D,), math.nan)}, "encoder.bias holds NaN"),
    ({"bias": torch.full((N,), math.inf)}, "bias holds NaN or infinite"),
])
def test_tensors_that_do_not_fit_are_named_with_what_was_expected(change, message, tmp_path):
    state = {key: t for key, t in (dictionary("AutoEncoder") | change).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        load_sae(write_dictionary(tmp_path, "AutoEncoder", state))


@pytest.mark.parametrize("name, trainer, message", [
    ("AutoEncodr", {}, "architecture 'AutoEncodr' is not known here; did you mean 'AutoEncoder'.*expected one of AutoEncoder, AutoEncoderNew"),
    ("CrossCoder", {}, "expected one of"), ("GatedAutoEncoder", {}, "missing decoder_bias, gate_bias, mag_bias, r_mag; unknown bias, encoder.bias"),
    ("AutoEncoder", dict(dict_size=D + 1), "expected"), ("AutoEncoder", dict(activation_dim="many"), "activation_dim.*expected an integer >= 1"),
])
def test_a_config_that_does_not_fit_is_refused(name, trainer, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_sae(write_dictionary(tmp_path, name, dictionary("AutoEncoder"), **trainer))


@pytest.mark.parametrize("change, message", [
    (dict(architecture="transcoder"), "architecture 'transcoder' is not known here.*standard, jumprelu, topk, gated"),
    (dict(architecture="jumprelu"), "missing threshold"), (dict(architecture="gated"), "missing b_gate, b_mag, r_mag; unknown b_enc"),
    (dict(architecture="topk"), "cfg.json has no k"), (dict(architecture="topk", k=D + 1), "k must be an integer in 1..9"),
    (dict(architecture="topk", k="all"), "expected an integer >= 1"),
    (dict(activation_fn_str="tanh-relu"), "activation function 'tanh-relu'"), (dict(d_sae=D - 1), r"W_enc has shape \(5, 9\), expected \(5, 8\)"),
    (dict(normalize_activations="covariance_whitening"), "normalize_activations is 'covariance_whitening', expected one of none"),
    (dict(normalize_activations="expected_average_only_in"), "Fix: pass norm_scaling_factor"), (dict(normalize_activations=True), "Fix: pass norm_scaling_factor"),
    (dict(apply_b_dec_to_input="yes"), "apply_b_dec_to_input is 'yes'"),
])
def test_a_cfg_that_does_not_fit_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_sae(write_lens(tmp_path, lens("standard"), lens_cfg("standard") | change))


def test_a_scaling_factor_is_refused_where_nothing_asks_for_it(tmp_path):
    folder = write_lens(tmp_path / "a", lens("standard"), lens_cfg("standard", "expected_average_only_in"))
    for wrong in (0., -1., math.nan, math.inf, "1"):
        with pytest.raises(ValueError, match="norm_scaling_factor must be a positive number"):
            load_sae(folder, norm_scaling_factor=wrong)
    with pytest.raises(ValueError, match="norm_scaling_factor is given"):
        load_sae(write_lens(tmp_path / "b", lens("standard"), lens_cfg("standard")), norm_scaling_factor=1.)
    with pytest.raises(ValueError, match="SAELens files only"):
        load_sae(write_dictionary(tmp_path / "c", "AutoEncoder", dictionary("AutoEncoder")), norm_scaling_factor=1.)


@pytest.mark.parametrize("text, message", [("{", "config.json is not JSON"), ("[1]", "config.json: found a list"),
                                           ('{"trainer": 3}', "trainer that is no dictionary")])
def test_a_config_that_is_no_config_is_refused(text, message, tmp_path):
    folder = write_dictionary(tmp_path, "AutoEncoder", dictionary("AutoEncoder"))
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sae(folder)


def test_different_k_in_weights_and_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="k is 3 in the weights and 4 in config.json"):
        load_sae(write_dictionary(tmp_path, "AutoEncoderTopK", dictionary("AutoEncoderTopK"), k=4))


def test_saelens_weights_alone_need_an_architecture(tmp_path):
    folder = write_lens(tmp_path, lens("jumprelu"), {})
    (folder / "cfg.json").unlink()
    with pytest.raises(ValueError, match="no cfg.json beside it"):
        load_sae(folder)
    assert load_sae(folder, architecture="jumprelu").kind == "jumprelu"


def test_a_folder_without_an_autoencoder_and_a_path_to_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no autoencoder: expected a file ae.pt or sae_weights.safetensors"):
        load_sae(tmp_path)
    for wrong in ("nothing", "a/b/c", str(tmp_path / "none")):
        with pytest.raises(ValueError, match="is not here: expected a folder"):
            load_sae(wrong)
    with pytest.raises(ValueError, match="dtype must be a floating-point type"):
        load_sae(tmp_path, dtype=torch.int64)


# --- Hugging Face

class Hub(types.ModuleType):
    "Two functions of huggingface_hub, over a folder; remembers what was asked for."
    def __init__(self, folder):
        super().__init__("huggingface_hub")
        self.folder, self.asked = folder, []

    def list_repo_files(self, repo, revision=None):
        return sorted(p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file())

    def hf_hub_download(self, repo, name, revision=None):
        self.asked.append((repo, name, revision))
        return str(self.folder / name)


def test_a_repository_is_read_at_a_revision_and_only_what_is_needed(tmp_path, monkeypatch):
    for i in (2, 3):
        write_lens(tmp_path / f"{i}-mlp-sm", lens("standard", seed=i), lens_cfg("standard"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(tmp_path))
    sae = load_sae("pythia-70m-deduped-mlp-sm", "blocks.3.hook_mlp_out", revision="abc", dtype=F64)
    close(sae.decoder_bias, lens("standard", seed=3)["b_dec"])
    repo = "ctigges/pythia-70m-deduped__mlp-sm_processed"
    assert sorted(hub.asked) == [(repo, "3-mlp-sm/cfg.json", "abc"), (repo, "3-mlp-sm/sae_weights.safetensors", "abc")]
    close(load_sae(repo, "2-mlp-sm", dtype=F64).decoder_bias, lens("standard", seed=2)["b_dec"])
    with pytest.raises(ValueError, match="found 0 autoencoders in 'blocks.9.hook_resid_post'"):
        load_sae("pythia-70m-deduped-mlp-sm", "blocks.9.hook_resid_post")


@pytest.mark.parametrize("release, site, folder", [
    ("att", "blocks.0.hook_attn_out", "0-att-sm"), ("res", "blocks.5.hook_resid_post", "5-res-sm"), ("res", "blocks.0.hook_resid_pre", "e-res-sm")])
def test_sites_of_the_releases_for_pythia(release, site, folder, tmp_path, monkeypatch):
    for name in (folder, "other"):
        write_lens(tmp_path / name, lens("standard"), lens_cfg("standard"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub := Hub(tmp_path))
    load_sae(f"pythia-70m-deduped-{release}-sm", site)
    assert {(repo, name.split("/")[0]) for repo, name, _ in hub.asked} == {(f"ctigges/pythia-70m-deduped__{release}-sm_processed", folder)}


def test_a_repository_that_holds_one_zip_is_read_through_it(tmp_path, monkeypatch):
    zipped(two_layers(tmp_path / "saes"), tmp_path / "repo.zip")
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo.zip").rename(tmp_path / "repo" / "dictionaries.zip")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "repo"))
    sae = load_sae("saprmarks/pythia-70m-deduped-saes", "mlp_out_layer1/10_32768", dtype=F64)
    close(sae.decoder_bias, dictionary("AutoEncoder", seed=1)["bias"])


def test_without_huggingface_hub_the_extra_is_named(monkeypatch, root):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install superposition_lc\[language\]"):
        load_sae("someone/something")
    assert "language_requirements = huggingface_hub" in (root / "settings.ini").read_text(encoding="utf-8")


# --- the way back

FORMATS = ["saelens", "dictionary_learning"]


def same_function(a, b, x, tolerance=1e-9):
    close(a.encode(x), b.encode(x), tolerance)
    close(a(x)[0], b(x)[0], tolerance)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=60)
@given(kind=st.sampled_from(KINDS), centred=st.booleans(), scale=st.sampled_from([1., .3, 7.]), seed=st.integers(0, 2**31))
def test_what_was_loaded_can_be_written_in_either_format(format, kind, centred, scale, seed, tmp_path_factory):
    sae = PretrainedSAE(**every_kind(seed=seed)[kind], centred=centred, scale=scale, fold_norms=False)
    back = load_sae(export_sae(sae, tmp_path_factory.mktemp("sae"), format), fold_norms=False, dtype=F64)
    same_function(back, sae, 3 * normal(9, N, seed=seed + 9))


@pytest.mark.parametrize("normalise", NORMALISE[1:3])
def test_normalisation_of_samples_survives_in_saelens_and_is_refused_elsewhere(normalise, tmp_path):
    sae = PretrainedSAE(**every_kind()["relu"], normalise=normalise, fold_norms=False)
    same_function(load_sae(export_sae(sae, tmp_path / "a"), fold_norms=False, dtype=F64), sae, normal(9, N, seed=4))
    with pytest.raises(ValueError, match="Fix: format='saelens'"):
        export_sae(sae, tmp_path / "b", "dictionary_learning")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", CLASSES)
def test_a_file_of_dictionary_learning_comes_back_bit_by_bit(name, tmp_path):
    state = dictionary(name)
    folder = write_dictionary(tmp_path / "a", name, state, **({"k": K} if "TopK" in name else {}))
    back = export_sae(load_sae(folder, dtype=F64), tmp_path / "b", "dictionary_learning")
    written, config = torch.load(back / "ae.pt", weights_only=True), json.loads((back / "config.json").read_text())["trainer"]
    assert config["lm_name"] == "EleutherAI/pythia-70m-deduped" and config["activation_dim"] == N
    if name == "MatryoshkaBatchTopKSAE":  # written as BatchTopKSAE, which encodes the same
        assert config["dict_class"] == "BatchTopKSAE" and torch.equal(written["encoder.weight"], state["W_enc"].T)
    else:
        assert config["dict_class"] == name and written.keys() == state.keys()
        assert all(torch.equal(written[key], state[key]) for key in state if (key, name) != ("threshold", "AutoEncoderTopK"))
    same_function(load_sae(back, dtype=F64), load_sae(folder, dtype=F64), normal(9, N, seed=4))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rescale", [False, True])
def test_a_file_of_saelens_comes_back_bit_by_bit(name, rescale, tmp_path):
    cfg, state = lens_cfg(name, rescale=rescale, centred=rescale), lens(name)
    back = export_sae(load_sae(write_lens(tmp_path / "a", state, cfg), dtype=F64), tmp_path / "b")
    written = load_file(back / "sae_weights.safetensors")
    assert written.keys() == state.keys() and all(torch.equal(written[key], state[key]) for key in state)
    found = json.loads((back / "cfg.json").read_text())
    assert {key: found[key] for key in cfg if key not in ("device", "metadata")} == {key: v for key, v in cfg.items() if key not in ("device", "metadata")}
    assert found["metadata"]["hook_name"] == "blocks.3.hook_mlp_out"


def trained_here(tied=True, k=None, seed=0):
    "A SparseAutoencoder with random numbers everywhere, its scale too."
    sae = SparseAutoencoder(N, D, k=k, tied=tied).to(F64)
    for i, p in enumerate(sae.parameters()):
        p.data = normal(*p.shape, seed=seed + i)
    sae.scale.fill_(2.7)
    return sae


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("k", [None, K])
def test_what_was_trained_here_comes_back_the_same(format, tied, k, tmp_path):
    sae, x = trained_here(tied, k), 3 * normal(40, N, seed=9)
    back = load_sae(export_sae(sae, tmp_path / "new" / "folder", format), fold_norms=False, dtype=F64)
    same_function(back, sae, x)
    folded = load_sae(tmp_path / "new" / "folder", dtype=F64)
    close(folded(x)[0], sae(x)[0])


def test_an_autoencoder_trained_on_data_counts_the_same_features_after_the_way_there_and_back(tmp_path):
    x = normal(500, N, seed=1).float()
    sae = train_sae(x, SAEConfig(kind="relu", steps=60, max_rounds=1, expansion=3), progress=False).sae[0]
    back = load_sae(export_sae(sae, tmp_path))
    F = [effective_features(feature_shares(s.encode(x))) for s in (sae, back)]
    assert F[0] == pytest.approx(F[1], rel=1e-5)
    assert json.loads((tmp_path / "cfg.json").read_text())["dtype"] == "float32"


def test_what_no_file_can_hold_is_refused_before_anything_is_written(tmp_path):
    for sae, message in [(SparseAutoencoder(N, D, lasso=True), "lasso codes.*Fix: train with SAEConfig"),
                         (SparseAutoencoder(N, D, stack=2), r"stack of 2.*sae\[0\]"),
                         (torch.nn.Linear(2, 2), "must be a SparseAutoencoder or a PretrainedSAE, got Linear")]:
        with pytest.raises(ValueError, match=message):
            export_sae(sae, tmp_path / "x")
    with pytest.raises(ValueError, match="format must be 'saelens' or 'dictionary_learning', got 'onnx'"):
        export_sae(trained_here(), tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_one_folder_holds_one_format(tmp_path):
    export_sae(trained_here(), tmp_path, "saelens")
    export_sae(trained_here(seed=3), tmp_path, "saelens")  # the same format again: replaced
    close(load_sae(tmp_path, dtype=F64).bias, trained_here(seed=3).bias.detach())
    with pytest.raises(ValueError, match="another format, sae_weights.safetensors"):
        export_sae(trained_here(), tmp_path, "dictionary_learning")


# --- the libraries themselves, where they are installed

ABSENT = "NOT COMPARED with the library itself, only with its formulas: {0} is not installed (pip install {0})"


@pytest.fixture(scope="module")
def learning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("dictionary_learning", reason=ABSENT.format("dictionary-learning"))


@pytest.fixture(scope="module")
def saelens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("sae_lens", reason=ABSENT.format("sae-lens"))


def library_class(learning, name):
    from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    return locals()[name]


@pytest.mark.parametrize("name", CLASSES)
def test_dictionary_learning_agrees(learning, name, tmp_path, capsys):
    made = library_class(learning, name)
    theirs = made(N, D, **({"k": K} if "TopK" in name else {}), **({"group_sizes": [1, D - 1]} if "Matryoshka" in name else {}))
    state = {key: t if key in ("k", "group_sizes") else t.float() for key, t in dictionary(name).items()}
    theirs.load_state_dict(state)
    folder = write_dictionary(tmp_path / "a", name, theirs.state_dict(), **({"k": K} if "TopK" in name else {}))
    x = 2 * normal(20, N, seed=9, dtype=torch.float32)
    ours = load_sae(folder, fold_norms=False)
    with torch.no_grad():
        close(ours.encode(x), theirs.encode(x), 1e-5)
        close(ours(x)[0], theirs(x), 1e-5)
        if name == "AutoEncoder":  # folds on loading, as we do
            close(load_sae(folder).encode(x), made.from_pretrained(str(folder / "ae.pt")).encode(x), 1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("k", [None, K])
def test_dictionary_learning_reads_what_was_trained_here(learning, tied, k, tmp_path):
    sae, x = trained_here(tied, k).float(), 2 * normal(20, N, seed=9, dtype=torch.float32)
    folder = export_sae(sae, tmp_path, "dictionary_learning")
    from dictionary_learning.utils import load_dictionary
    theirs, config = load_dictionary(str(folder), "cpu")
    with torch.no_grad():
        z = sae.encode(x) * load_sae(folder).norms if k is None else sae.encode(x)  # AutoEncoder folds norms on loading
        close(theirs.encode(x), z, 1e-4)
        close(theirs(x), sae(x)[0], 1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("normalise", NORMALISE[:3])
@pytest.mark.parametrize("flag", [True, False])
def test_saelens_agrees(saelens, name, normalise, flag, tmp_path):
    cfg = lens_cfg(name, normalise, flag, rescale=flag) | {"device": "cpu"}
    theirs = saelens.SAE.from_dict(cfg)
    theirs.load_state_dict(lens(name))
    theirs.save_model(tmp_path / "a")
    x = 2 * normal(20, N, seed=9) + 1
    ours = load_sae(tmp_path / "a", fold_norms=False, dtype=F64)
    with torch.no_grad():
        close(ours.encode(x), theirs.encode(x))
        close(ours(x)[0], theirs(x))
    back = saelens.SAE.load_from_disk(export_sae(ours, tmp_path / "b"))
    with torch.no_grad():
        close(back.encode(x), theirs.encode(x))
        close(back(x), theirs(x))
    if name != "topk" or flag:
        back.fold_W_dec_norm()
        close(load_sae(tmp_path / "a", dtype=F64).encode(x), back.encode(x).detach())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saelens_agrees_on_files_from_before_its_sixth_version(saelens, name, tmp_path):
    cfg = lens_cfg(name, "layer_norm")
    folder = write_lens(tmp_path, lens(name), old_cfg(cfg) | {"device": "cpu"})
    theirs, x = saelens.SAE.load_from_disk(folder), 2 * normal(20, N, seed=9)
    with torch.no_grad():
        close(load_sae(folder, fold_norms=False, dtype=F64).encode(x), theirs.encode(x))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_saelens_folds_a_scaling_factor_as_we_do(saelens, name, tmp_path):
    folder = write_lens(tmp_path, lens(name), lens_cfg(name, "expected_average_only_in") | {"device": "cpu"})
    theirs, x = saelens.SAE.load_from_disk(folder), 2 * normal(20, N, seed=9)
    theirs.fold_activation_norm_scaling_factor(.3)
    ours = load_sae(folder, fold_norms=False, dtype=F64, norm_scaling_factor=.3)
    with torch.no_grad():
        close(ours.encode(x), theirs.encode(x))
        close(ours(x)[0], theirs(x))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("k", [None, K])
def test_saelens_reads_what_was_trained_here(saelens, tied, k, tmp_path):
    sae, x = trained_here(tied, k), 2 * normal(20, N, seed=9)
    theirs = saelens.SAE.load_from_disk(export_sae(sae, tmp_path))
    with torch.no_grad():
        close(theirs.encode(x), sae.encode(x))
        close(theirs(x), sae(x)[0])
