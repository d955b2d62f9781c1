"""The loops people write today: one model at a time, nn.Module, DataLoader, autograd, Adam; one input at a time for activations."""
import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset


class PlainSAE(nn.Module):
    "A tied ReLU autoencoder (paper, Section 3.2)."

    def __init__(self, n_neurons: int, n_features: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(n_features, n_neurons)))
        self.bias = nn.Parameter(torch.zeros(n_features))

    def forward(self, x):
        z = F.relu(F.linear(x, self.weight, self.bias))
        return z @ self.weight, z


def loader(x: torch.Tensor, batch_size: int, seed: int = 0) -> DataLoader:
    "Shuffled batches of the rows of x."
    return DataLoader(TensorDataset(x), batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def train_sae(model: nn.Module, batches: DataLoader, epochs: int, l1: float = .1, lr: float = 1e-3) -> list[float]:
    "Mean loss of every epoch; the loss is the released code's, means over neurons and over the dictionary."
    adam, losses = torch.optim.Adam(model.parameters(), lr), []
    for _ in range(epochs):
        total = 0.
        for x, in batches:
            x_hat, z = model(x)
            loss = F.mse_loss(x_hat, x) + l1 * z.abs().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            total += loss.item()
        losses.append(total / len(batches))
    return losses


class PlainToyModel(nn.Module):
    "Elhage et al.'s model: f' = ReLU(W^T W f + b) (paper, Section 3.1)."

    def __init__(self, n_features: int, n_neurons: int):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(n_neurons, n_features)))
        self.bias = nn.Parameter(torch.zeros(n_features))

    def forward(self, f): return F.relu(F.linear(F.linear(f, self.weight), self.weight.T, self.bias))


def features(n: int, n_features: int, sparsity: float) -> torch.Tensor:
    "Features (n, n_features): each is zero with probability `sparsity`, else uniform on [0, 1]."
    return torch.rand(n, n_features) * (torch.rand(n, n_features) >= sparsity)


def train_toy_model(model: nn.Module, batches, importance: torch.Tensor, steps: int, lr: float = 1e-2) -> list[float]:
    "Loss of every step; `batches` gives the features of `steps` steps, as a DataLoader does; the rate decays to 0."
    adam, losses = torch.optim.Adam(model.parameters(), lr, betas=(.9, .99)), []
    for step, (f,) in enumerate(batches):
        adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        loss = (importance * (f - model(f)) ** 2).sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


class PlainAttention(nn.Module):
    "Causal attention."

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class PlainBlock(nn.Module):
    "Attention and MLP beside each other on a residual stream, as in GPT-NeoX."

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norms, self.attention = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)]), PlainAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x): return x + self.attention(self.norms[0](x)) + self.mlp(self.norms[1](x))


class PlainTransformer(nn.Module):
    "A decoder without positions or head, its modules named as GPT-NeoX names them."

    def __init__(self, vocab: int, width: int, n_layers: int):
        super().__init__()
        self.embed_in = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(PlainBlock(width, max(1, width // 64)) for _ in range(n_layers))

    def forward(self, input_ids, attention_mask=None):
        x = self.embed_in(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def capture(model: nn.Module, x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    "The layer's output for every input, neurons last: (S, N); positions of an image are samples."
    kept = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output.detach().cpu()))
    model.eval()
    with torch.no_grad():
        for image in x:
            model(image[None])
    handle.remove()
    return torch.cat([out.movedim(1, -1).reshape(-1, out.shape[1]) for out in kept])


def learning_coefficient(model: nn.Module, x: torch.Tensor, y: torch.Tensor, chains: int, draws: int, batch_size: int = 128, seed: int = 0, **sampler) -> float:
    "The local learning coefficient by devinterp, one checkpoint; `sampler`: lr, nbeta, localization. ImportError where it is not installed."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from devinterp.optim.sgmcmc import SGMCMC
        from devinterp.slt.sampler import estimate_learning_coeff_with_summary
        batches = DataLoader(TensorDataset(x, y), batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return float(estimate_learning_coeff_with_summary(model, batches, evaluate=lambda m, b: F.cross_entropy(m(b[0]), b[1]), sampling_method=SGMCMC.sgld,
                                                          optimizer_kwargs=sampler, num_chains=chains, num_draws=draws, seed=seed, verbose=False)["llc/mean"])
