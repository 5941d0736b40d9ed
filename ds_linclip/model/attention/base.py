"""What all kinds of self-attention have in common: projections, heads, and the linear state."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_linclip.config import AttentionSettings
from ds_linclip.model.attention.local import local_part
from ds_linclip.model.attention.parameters import OwnParameter
from ds_linclip.model.attention.patches import Patches
from ds_linclip.parallel.context_parallel import sum_over_ranks
from ds_linclip.parallel.mesh import Mesh
from ds_linclip.parallel.tensor_parallel import (
    HeadRMSNorm,
    column_parallel,
    head_parameter,
    row_parallel,
    sum_gradients_of_heads,
)
from linclip_kernels import (
    linear_attention,
    linear_attention_from_state,
    linear_attention_packed,
    linear_attention_state,
)

__all__ = ["LinearStateAttention", "PlainStateAttention", "SelfAttention", "identity_values"]

#: Arguments of the operator that the state of the keys depends on.
_OF_THE_STATE = {"feature_map", "qk_norm", "backend"}
#: Added to the seed of a block for the parameters of one kind alone.
_OWN_SEED = 2**45


class SelfAttention(nn.Module):
    """Multi-head self-attention over ``[B, N, width]``, heads split over the tensor axis.

    A kind overrides :meth:`flops` and :meth:`attend`; :meth:`own_parameters` if it has any; and
    :meth:`prepare` if it needs more than queries, keys and values. The rows of the joint q, k, v
    projection are ordered [head, (q, k, v), head_dim] as in Megatron, so that a contiguous split of
    the rows is a split of the heads.

    Args:
        width: Size of a token's embedding; a multiple of ``heads``.
        heads: Number of heads; must be divisible by the tensor-parallel size.
        settings: The settings of the kind.
        mesh: Splits heads (tensor axis) and tokens (context axis).
        causal: Whether a token attends only to itself and the tokens before it.
        init_qkv: Initializes the unsplit weight [3 * width, width].
        init_out: Initializes the unsplit weight [width, width].
    """

    def __init__(
        self,
        width: int,
        heads: int,
        settings: AttentionSettings,
        mesh: Mesh,
        *,
        causal: bool,
        init_qkv: Callable[[Tensor], object],
        init_out: Callable[[Tensor], object],
    ) -> None:
        super().__init__()
        if heads % mesh.tp.size:
            raise ValueError(f"heads ({heads}) must be divisible by parallel.tp ({mesh.tp.size})")
        self.width, self.heads = width, heads
        self.local_heads = heads // mesh.tp.size
        self.head_dim = width // heads
        self.settings: Any = settings
        self.mesh = mesh
        self.causal = causal
        #: Backend of linear attention; "auto": Triton on a GPU, torch otherwise.
        self.backend: Literal["auto", "torch", "triton"] = "auto"
        # The ranks that hold the other tokens of the same images; texts are not split.
        self.cp_group = mesh.cp.group if mesh.cp.size > 1 and not causal else None
        self.qkv = column_parallel(mesh, width, 3 * width, init=init_qkv)
        self.out_proj = row_parallel(mesh, width, width, init=init_out)
        self._shared: set[str] = set()
        with _own_random_numbers():
            for name, own in self.own_parameters(settings, width, heads, causal=causal).items():
                self.register_parameter(name, head_parameter(mesh, *own))
                if own.split is None:
                    self._shared.add(name)

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        """Return the parameters that the kind has beside q, k, v and the output projection.

        They become attributes; read those that heads share with :meth:`shared`. Matrices get weight
        decay, vectors none. Their random numbers leave all other weights of the model as they are.
        """
        return {}

    @classmethod
    def own_shapes(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> dict[str, tuple[int, ...]]:
        """Return name and unsplit shape of all parameters that softmax attention does not have."""
        own = cls.own_parameters(settings, width, heads, causal=causal)
        return {name: each.shape for name, each in own.items()}

    @classmethod
    def num_summed(cls, settings: Any, width: int, num_tokens: int, *, causal: bool) -> int:
        """Return how many numbers per sequence the backward sums over the tensor-parallel ranks,
        beside gradients of what q, k and v are projected from, and of shared parameters."""
        return 0

    @classmethod
    def num_state_values(cls, settings: Any, head_dim: int) -> int:
        """Return how many fp32 numbers per sequence and head context-parallel ranks sum up."""
        raise NotImplementedError

    @classmethod
    def projection_flops(cls, settings: Any, width: int, heads: int, *, causal: bool) -> float:
        """Return the FLOPs per token of what the kind projects beside q, k, v and the output."""
        return 0

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        """Return the FLOPs of the forward pass per token and head, all but those of the q, k, v and
        output projections and of :meth:`projection_flops`: matrix products only, two operations
        per multiply-add."""
        raise NotImplementedError

    def forward(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        """Return the sum of attended values for every token.

        Args:
            x: Tokens [B, N, width].
            patches: Where the tokens of an image lie; not needed for every kind.

        Returns:
            [B, N, width], summed over the tensor-parallel ranks.
        """
        o, v = self.attended(x, patches)
        o = self.finish(o, x, v, patches)
        return self.out_proj(o.flatten(2))  # [B, N, H * D] -> [B, N, width]

    def attended(self, x: Tensor, patches: Patches | None) -> tuple[Tensor, Tensor]:
        """Return the result of :meth:`attend`, and the values."""
        q, k, v, *more = self.prepare(x, patches)
        return self.attend(q, k, v, *more), v

    def project_packed(self, x: Tensor) -> Tensor:
        """Return queries, keys and values of this rank's heads, [B, N, H, 3, D]."""
        qkv: Tensor = self.qkv(x)
        return qkv.unflatten(-1, (self.local_heads, 3, self.head_dim))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of this rank's heads, [B, N, H, D] each, strided."""
        q, k, v = self.project_packed(x).unbind(3)
        return q, k, v

    def prepare(self, x: Tensor, patches: Patches | None) -> tuple[Tensor, ...]:
        """Return the arguments of :meth:`attend`, with the values [B, N, H, D] as the third."""
        return self.project(x)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        """Return the weighted sums [B, N, H, Dv] of values [B, N, H, Dv], linear in the values."""
        raise NotImplementedError

    def finish(self, o: Tensor, x: Tensor, v: Tensor, patches: Patches | None) -> Tensor:
        """Return what enters the output projection, of the result of :meth:`attend`."""
        return o

    def weights(self, x: Tensor, patches: Patches | None = None) -> Tensor:
        """Return the weight of every value in every output of :meth:`attend`, [B, H, N, N].

        Raises:
            ValueError: when the kind multiplies values by matrices.
        """
        if not self.settings.has_weights:
            raise ValueError(
                f"attention ({self.settings}) must have a number as the weight of every value in "
                "every output: this one multiplies values by matrices"
            )
        q, k, _, *more = self.prepare(x, patches)
        return self.attend(q, k, identity_values(q), *more).transpose(1, 2)

    def start_from_softmax(self) -> None:
        """Set the kind's own parameters for projections that were trained with softmax attention.

        They already have their initial values.
        """

    def check_patches(self, patches: Patches | None) -> None:
        """Check that the tokens of an image come with their places.

        Raises:
            ValueError: when they are missing.
        """
        if patches is None and not self.causal:
            raise ValueError(f"patches (None) must be given: attention {self.settings} needs them")

    @property
    def num_shared(self) -> int:
        """Number of values in parameters that heads share."""
        return sum(getattr(self, name).numel() for name in self._shared)

    def shared(self, name: str) -> Tensor:
        """Return a parameter that all heads use; its gradient is summed over the tensor-parallel
        ranks, which hold different heads."""
        assert name in self._shared
        return sum_gradients_of_heads(getattr(self, name), self.mesh)


class LinearStateAttention(SelfAttention):
    """Kinds that sum phi(k) v^T over the keys: one call of the linear-attention operator, a norm of
    the heads and a local part."""

    def __init__(self, width: int, heads: int, settings: Any, mesh: Mesh, **options: Any) -> None:
        super().__init__(width, heads, settings, mesh, **options)
        self.local = local_part(settings.local, causal=self.causal)
        self.head_norm: HeadRMSNorm | None = None
        if settings.head_norm:
            self.head_norm = HeadRMSNorm(self.local_heads, self.head_dim)

    @classmethod
    def own_parameters(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> Mapping[str, OwnParameter]:
        return local_part(settings.local, causal=causal).own_parameters(width, heads)

    @classmethod
    def own_shapes(
        cls, settings: Any, width: int, heads: int, *, causal: bool
    ) -> dict[str, tuple[int, ...]]:
        shapes = super().own_shapes(settings, width, heads, causal=causal)
        return shapes | ({"head_norm.weight": (width,)} if settings.head_norm else {})

    @classmethod
    def num_features(cls, settings: Any, head_dim: int) -> int:
        """Return the size of phi(k), the features of a key."""
        return head_dim

    @classmethod
    def num_state_values(cls, settings: Any, head_dim: int) -> int:
        return (cls.num_features(settings, head_dim) + 1) * (head_dim + 1)

    @classmethod
    def flops(cls, settings: Any, head_dim: int, num_tokens: int, *, causal: bool) -> float:
        # Every key is added to the state, and every query reads it.
        state = 4 * cls.num_features(settings, head_dim) * head_dim
        return state + local_part(settings.local, causal=causal).flops(head_dim, num_tokens)

    @classmethod
    def num_summed(cls, settings: Any, width: int, num_tokens: int, *, causal: bool) -> int:
        return local_part(settings.local, causal=causal).num_summed(width, num_tokens)

    def finish(self, o: Tensor, x: Tensor, v: Tensor, patches: Patches | None) -> Tensor:
        if self.head_norm is not None:
            o = self.head_norm(o)
        if self.settings.needs_grid:
            self.check_patches(patches)
        return self.local.add(o, x, v, patches, self.get_parameter, self.mesh)

    def start_from_softmax(self) -> None:
        for name in self.local.zeroed:
            nn.init.zeros_(self.get_parameter(name))

    def sum_values(self, q: Tensor, k: Tensor, v: Tensor, **form: Any) -> Tensor:
        """Return linear attention with the operator's arguments ``form``, over the keys of all
        context-parallel ranks."""
        form["backend"] = self.backend
        if self.cp_group is None:
            return linear_attention(q, k, v, causal=self.causal, **form)
        features = {name: form[name] for name in form if name in _OF_THE_STATE}
        state = sum_over_ranks(linear_attention_state(k, v, **features), self.cp_group)
        return linear_attention_from_state(q, state, **form)


class PlainStateAttention(LinearStateAttention):
    """Kinds that hand queries, keys and values to the operator as they are projected, packed where
    nothing else takes them: then no gradients of them are stacked."""

    def form(self) -> dict[str, Any]:
        """Return the operator's arguments."""
        raise NotImplementedError

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        return self.sum_values(q, k, v, **self.form())

    def attended(self, x: Tensor, patches: Patches | None) -> tuple[Tensor, Tensor]:
        if self.cp_group is not None or self.settings.local.kind != "none":
            return super().attended(x, patches)
        qkv = self.project_packed(x)
        form = self.form()
        o = linear_attention_packed(qkv, causal=self.causal, backend=self.backend, **form)
        return o, qkv.select(3, 2)


def identity_values(q: Tensor) -> Tensor:
    """Return values [B, N, H, N] for queries [B, N, H, D], of which attention makes its weights:
    every token has an entry of its own, which is one."""
    batch, num_tokens, heads, _ = q.shape
    identity = torch.eye(num_tokens).to(q)[None, :, None]  # [1, N, 1, N]
    return identity.expand(batch, -1, heads, -1)


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + _OWN_SEED)
        yield
