"""Importance at the level of ranks: the output directions of a site that matter most for a data set (ActSVD).

Owns the streaming second moments, the singular directions that follow from them, and the shares of a change of
weights that lie in a subspace. Knows nothing of adapters, studies or files. Source: Wei et al., ICML 2024 (arXiv
2402.05162), section 3.3. Shapes: O = out, I = in, N = response tokens, R = rank, S = min(O, I).

ActSVD: with X [I, N] the inputs of a site at response tokens, U the top-R left singular vectors of W X, the matrix
U Uᵀ W is the rank-R matrix V that minimises ‖W X - V X‖ in the Frobenius norm.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import scipy.linalg
import torch
from torch import nn

from neurondrift.base.errors import ConfigError, DataError
from neurondrift.importance.capture import run
from neurondrift.importance.methods import Tokens
from neurondrift.importance.scores import check_loaded, pad_token_id_of, split_into_passes
from neurondrift.models.batches import Batch, make_batches
from neurondrift.models.sites import Site, Sites

logger = logging.getLogger(__name__)

# Response tokens of a site that are kept before they are added to its moments: adding one example at a time would
# read and write every accumulator once an example.
KEPT_TOKENS = 128
# A direction whose length is below this share of the largest has none that can be told from rounding.
NEGLIGIBLE = 1e-6


class Basis(NamedTuple):
    """Orthonormal output directions of a site.

    `directions` float64 `[O, R]` on the CPU, the most important first. `lengths` `[R]`: for ActSVD the singular
    values of W X. `energy`: ‖W X‖², the sum over all directions. `tokens`: the response tokens seen. `inner`
    `[K, K]`: Σ (A x)(A x)ᵀ over the same tokens, where an A `[K, I]` was given for the site.
    """

    directions: torch.Tensor
    lengths: torch.Tensor
    energy: float
    tokens: int
    inner: torch.Tensor | None = None

    @property
    def explained(self) -> float:
        """Share of ‖W X‖² in these directions; NaN where W X is zero."""
        return float(self.lengths.square().sum()) / self.energy if self.energy > 0 else float("nan")


@dataclass(kw_only=True)
class _Moments:
    """Σ x xᵀ of one site, or Σ y yᵀ with y = W x, whichever is smaller, float64 `[S, S]`; bias plays no part."""

    site: Site
    factor: torch.Tensor | None  # A [K, I]
    matrix: torch.Tensor = field(init=False)
    inner: torch.Tensor | None = None
    tokens: int = 0
    kept: list[torch.Tensor] = field(default_factory=list)
    kept_tokens: int = 0

    def __post_init__(self) -> None:
        out_features, in_features = self.site.shape
        self.of_outputs = out_features <= in_features
        device = _device_of(self.site)
        self.matrix = torch.zeros((min(out_features, in_features),) * 2, dtype=torch.float64, device=device)
        if self.factor is not None:
            self.factor = self.factor.to(device=device, dtype=torch.float64)
            self.inner = torch.zeros((len(self.factor),) * 2, dtype=torch.float64, device=device)

    def add(self, inputs_NI: torch.Tensor) -> None:
        self.kept.append(inputs_NI)
        self.kept_tokens += len(inputs_NI)
        if self.kept_tokens >= KEPT_TOKENS:
            self.flush()

    def flush(self) -> None:
        if not self.kept:
            return
        inputs_NI = torch.cat(self.kept).to(device=self.matrix.device).double()
        self.tokens += self.kept_tokens
        self.kept, self.kept_tokens = [], 0
        seen = inputs_NI @ _weight(self.site).T if self.of_outputs else inputs_NI
        self.matrix.addmm_(seen.T, seen)
        if self.factor is not None and self.inner is not None:
            projected_NK = inputs_NI @ self.factor.T
            self.inner.addmm_(projected_NK.T, projected_NK)

    def basis(self, rank: int) -> Basis:
        """The top left singular vectors of W X.

        Of outputs: the eigenvectors of Y Yᵀ. Of inputs: with W = Q R (thin), W X = Q (R X), so they are Q times the
        eigenvectors of R (X Xᵀ) Rᵀ. Directions whose singular value is rounding have no meaning and are left out.
        """
        self.flush()
        if self.of_outputs:
            values_R, vectors_SR, energy = _top_eigen(self.matrix, rank)
            directions = vectors_SR
        else:
            q_OS, r_SI = torch.linalg.qr(_weight(self.site).to(self.matrix.device))
            values_R, vectors_SR, energy = _top_eigen(r_SI @ self.matrix @ r_SI.T, rank)
            directions = q_OS @ vectors_SR
        lengths = values_R.clamp(min=0).sqrt()
        # Squares lose half the digits: below NEGLIGIBLE of the largest, a length is rounding.
        known = (lengths > NEGLIGIBLE * lengths[0]) & (lengths > 0)
        return Basis(
            directions[:, known].cpu(),
            lengths[known].cpu(),
            energy,
            self.tokens,
            None if self.inner is None else self.inner.cpu(),
        )


def _device_of(site: Site) -> torch.device:
    """Where a site's moments live: with its weight, or in main memory where the device has no float64."""
    device = site.tensor.device
    return torch.device("cpu") if device.type == "mps" else device


def _weight(site: Site) -> torch.Tensor:
    """The weight in float64 `[O, I]`, on the device of the moments."""
    return site.weight.to(device=_device_of(site)).double()


def _top_eigen(matrix_SS: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The largest eigenvalues of a symmetric matrix, descending, their vectors, and the trace."""
    size = len(matrix_SS)
    trace = float(matrix_SS.trace())
    if matrix_SS.device.type == "cpu":  # LAPACK stops at the wanted part: a third of the time of all
        wanted = [size - count, size - 1]
        values, vectors = scipy.linalg.eigh(matrix_SS.numpy(), subset_by_index=wanted, check_finite=False)
        return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy()), trace
    all_values, all_vectors = torch.linalg.eigh(matrix_SS)
    return all_values.flip(0)[:count], all_vectors.flip(1)[:, :count], trace


def iterate_bases(
    model: nn.Module,
    encoded: Sequence[Mapping[str, Any]],
    *,
    rank: int,
    sites: Mapping[str, Site] | None = None,
    factors: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 8,
    padding_side: str = "right",
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> Iterator[tuple[str, Basis]]:
    """As `bases`, site by site: the moments of a site are dropped when its directions are known."""
    sites = Sites(model) if sites is None else sites
    check_rank(rank, sites)
    check_loaded(sites)
    batches = make_batches(
        encoded,
        model=model,
        batch_size=batch_size,
        pad_token_id=pad_token_id_of(model),
        padding_side=padding_side,
    )
    given = factors or {}
    for names in plan_moments(sites):
        moments = {name: _Moments(site=sites[name], factor=given.get(name)) for name in names}

        def record(site: Site, tokens: Tokens, moments: dict[str, _Moments] = moments) -> None:
            assert tokens.inputs is not None and tokens.is_response is not None
            if bool(tokens.is_response.any()):
                moments[site.name].add(tokens.inputs[tokens.is_response])

        with torch.no_grad():
            part = {name: sites[name] for name in names}
            run(model, part, batches, record, backward=False, on_batch=on_batch)
            for name in names:
                yield name, moments.pop(name).basis(rank)


def bases(
    model: nn.Module,
    encoded: Sequence[Mapping[str, Any]],
    *,
    rank: int,
    sites: Mapping[str, Site] | None = None,
    factors: Mapping[str, torch.Tensor] | None = None,
    batch_size: int = 8,
    padding_side: str = "right",
    on_batch: Callable[[Batch], None] = lambda batch: None,
) -> dict[str, Basis]:
    """The output directions of every site that carry most of W X over the response tokens of a data set.

    Parameters
    ----------
    model, encoded, batch_size, padding_side, on_batch
        As in `score`; the result depends on neither batch size nor padding.
    rank
        Directions for each site.
    sites
        These only; default: `linear_sites(model)`.
    factors
        Site name -> A `[K, I]`: `Basis.inner` is then Σ (A x)(A x)ᵀ, all that is needed to weigh a change B A by
        the same inputs (`share_of_change`).
    batch_size
        Examples that pass through the model together.

    Returns
    -------
    dict
        Site name -> `Basis` of at most `rank` directions: fewer where W X has a smaller rank (few response tokens,
        an expert that few tokens were sent to; none for an expert that no token was sent to).

    Raises
    ------
    ConfigError
        A rank below 1 or above min(out, in) of a site, which is named.
    DataError
        No examples, an example without response tokens, a loss that is not finite.
    ModelError
        Weights that are offloaded, or a model whose structure is not known.

    Notes
    -----
    No activation matrix is stored: each site has one float64 matrix of min(out, in)² (the sites are split over
    several passes where they do not fit beside the model) and at most `KEPT_TOKENS` + one example's tokens in
    the model's dtype. Sums, products with W and eigenvectors are float64. Under `torch.distributed` every process
    does all of it. Deviation from Wei et al.'s code: the inputs of all sites are those of the unchanged model; there a
    block's inputs are recorded after the blocks before it have been changed, and the singular vectors are approximate
    (`torch.svd_lowrank`).
    """
    return dict(
        iterate_bases(
            model,
            encoded,
            rank=rank,
            sites=sites,
            factors=factors,
            batch_size=batch_size,
            padding_side=padding_side,
            on_batch=on_batch,
        )
    )


def check_rank(rank: int, sites: Mapping[str, Site], *, setting: str = "rank") -> None:
    """Raise `ConfigError` unless every site has that many directions."""
    if not sites:
        raise DataError("There are no sites to take directions of")
    if rank < 1:
        raise ConfigError(f"The {setting} must be at least 1", received=rank)
    smallest = min(sites, key=lambda name: min(sites[name].shape))
    most = min(sites[smallest].shape)
    if rank > most:
        raise ConfigError(
            f"The {setting} is larger than the site {smallest} {list(sites[smallest].shape)} has",
            received=rank,
            allowed=f"1 to {most}",
        )


def plan_moments(sites: Mapping[str, Site], *, free: Mapping[torch.device, int] | None = None) -> list[list[str]]:
    """The sites of each pass over the data, so that their float64 moments fit in 75 % of the free memory."""
    sizes = {name: moment_bytes(site) for name, site in sites.items()}
    passes = split_into_passes(sizes, {name: _device_of(site) for name, site in sites.items()}, free=free)
    logger.info("subspaces: %.2f GB of moments, %d pass(es) over the data", sum(sizes.values()) / 1e9, len(passes))
    return passes


def moment_bytes(site: Site) -> int:
    """Memory of one site: its float64 moments, and the inputs that are kept before they are added."""
    kept = KEPT_TOKENS * site.shape[1] * max(2, site.tensor.element_size())
    return 8 * min(site.shape) ** 2 + kept


class Projection(NamedTuple):
    """P = `left` @ `right`, `[O, K]` and `[K, O]`, float64: what removal takes out of a site is P W."""

    left: torch.Tensor
    right: torch.Tensor


def projection(directions_OR: torch.Tensor) -> Projection:
    """Π = U Uᵀ. U Uᵀ W is ActSVD's rank-R approximation, W - U Uᵀ W its removal."""
    return Projection(directions_OR, directions_OR.T)


def safety_only(safety_OR: torch.Tensor, utility_OR: torch.Tensor) -> Projection:
    """(I - Π_utility) Π_safety, so that P W is ΔW of Wei et al., section 3.3: of rank at most the safety rank, and
    orthogonal to every utility direction. Not symmetric, hence no projection in the strict sense.

    Their r^s and r^u count the ranks that are left out: the ranks here are R - r^s and R - r^u, R = min(out, in).
    """
    return Projection(outside(safety_OR, utility_OR), safety_OR.T)


def outside(first_OR: torch.Tensor, second_OR: torch.Tensor) -> torch.Tensor:
    """(I - Π_second) U_first, float64 `[O, R]`, not orthonormal."""
    # Twice: what rounding leaves of the second subspace after the first time is removed by the second.
    rest = first_OR - second_OR @ (second_OR.T @ first_OR)
    return rest - second_OR @ (second_OR.T @ rest)


def safety_only_directions(safety_OR: torch.Tensor, utility_OR: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the range of (I - Π_utility) Π_safety; safety directions within the utility subspace
    (an angle below `NEGLIGIBLE`) leave none."""
    if safety_OR.shape[1] == 0:
        return safety_OR
    vectors_OR, sines_R, _ = torch.linalg.svd(outside(safety_OR, utility_OR), full_matrices=False)
    return vectors_OR[:, sines_R > NEGLIGIBLE]


def random_directions(out_features: int, rank: int, generator: torch.Generator) -> torch.Tensor:
    """An orthonormal basis of a uniformly random subspace, float64 `[O, R]`."""
    normal = torch.randn(out_features, rank, dtype=torch.float64, generator=generator)
    directions: torch.Tensor = torch.linalg.qr(normal).Q
    return directions


def overlap(first_OR: torch.Tensor, second_OR: torch.Tensor) -> float:
    """‖U₁ᵀU₂‖² / R₁: the share of the first subspace within the second; R₂/O by chance. NaN where R₁ is 0."""
    rank = first_OR.shape[1]
    return float((first_OR.T @ second_OR).square().sum()) / rank if rank else float("nan")


class Share(NamedTuple):
    """`inside` ‖U Uᵀ Δ‖² and `total` ‖Δ‖², in units of the weights squared."""

    inside: float
    total: float


def share_of_change(
    directions_OR: torch.Tensor, change_OK: torch.Tensor, inner_KK: torch.Tensor | None = None
) -> Share:
    """How much of a change of weights lies in a subspace of the outputs.

    Parameters
    ----------
    directions_OR
        Orthonormal, float64.
    change_OK
        Δ itself (K = I) without `inner_KK`, or the B of Δ = B A.
    inner_KK
        A Aᵀ gives ‖U Uᵀ Δ‖² and ‖Δ‖²; Σ (A x)(A x)ᵀ (`Basis.inner`) gives ‖U Uᵀ Δ X‖² and ‖Δ X‖², the change of
        the site's outputs on a data set. Neither forms Δ.
    """
    change = change_OK.double()
    within = directions_OR.T @ change
    if inner_KK is None:
        return Share(float(within.square().sum()), float(change.square().sum()))
    inner = inner_KK.double()
    return Share(float(((within @ inner) * within).sum()), float(((change @ inner) * change).sum()))
