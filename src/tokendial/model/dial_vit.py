"""DialViT: a ViT with token reduction, adapters and a dial. It behaves like a timm model.

The class has one short method for each thing that users ask of a model; the blocks run here, the
rest is done elsewhere: `blocks.py` runs one block, `features.py` and `intermediates.py` undo
reductions, `heads.py` knows the classification head, `adapter_set.py` lets adapters take turns,
`saved_model.py` and `files.py` write and read.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tokendial.adapt.base import AdapterConfig
from tokendial.attention import PYTORCH_KERNEL, AttentionKernel
from tokendial.backbones import Backbone, anatomy_of, fingerprint
from tokendial.decode import DecoderConfig
from tokendial.measure.cost import Cost
from tokendial.model.adapter_set import AdapterSet
from tokendial.model.arguments import check_method
from tokendial.model.backbone_source import BackboneSource
from tokendial.model.blocks import BlockRunner, Step
from tokendial.model.dial import Compensation, check_degree, run_by_degree
from tokendial.model.features import collect_maps, pooled_features, restored_map
from tokendial.model.files import config_errors
from tokendial.model.heads import check_headless, head_names, head_size, reset_head, timm_method
from tokendial.model.hub import push_files
from tokendial.model.intermediates import collect_intermediates
from tokendial.model.model_cost import model_cost
from tokendial.model.protect import check_mask, protect
from tokendial.model.saved_model import SavedModel, trained_tensors
from tokendial.model.sharing import add_user, check_sharing, remove_user
from tokendial.passes import ForwardPass
from tokendial.reduce.base import ReducerConfig
from tokendial.tokens import Tokens


class DialViT(nn.Module):
    """A ViT with token reduction, adapters and a dial; built by `wrap`."""

    checkpoint_activations: bool = False
    """Whether training recomputes the blocks in the backward pass instead of keeping their
    activations, which takes less memory and more time. See `set_grad_checkpointing`."""
    attention_kernel: AttentionKernel = PYTORCH_KERNEL
    """How attention is computed. `tokendial.optimize` chooses what is fastest on the machine."""
    skip_unread_patches: bool = False
    """Whether `forward` skips the patch outputs of the last block if the head ignores them. The
    patches still serve as keys and values, so the logits are the same."""

    def __init__(
        self,
        vit: nn.Module,
        *,
        reduce: ReducerConfig | None,
        adapt: AdapterConfig | None,
        decode: DecoderConfig | None,
        backbone: Backbone | None,
    ) -> None:
        super().__init__()
        self.anatomy = anatomy_of(vit)
        """Calls the parts of the backbone: embedding, attention, FFN, head."""
        self.reduce_config = reduce
        """The reduction method; None: there is none."""
        self.fingerprint = fingerprint(vit)
        """A few weights of the backbone, by which saved models recognise it."""
        self.vit: Any = vit
        """The backbone, an ordinary timm or transformers model."""
        self.compensation: Compensation | None = None
        """The attached compensator, which follows the dial; None: there is none."""
        self._protected: Tensor | None = None
        self._source = BackboneSource(self.anatomy, backbone)
        self._adapters = AdapterSet(self.anatomy, reduce, adapt, decode)
        self._degree = 0
        if reducer := self._adapters.active_slot.reducer:
            check_degree(reducer.degree, reducer.degrees)
            self._degree = reducer.degree
        check_sharing(vit, self, adapts=adapt is not None)
        self._adapters.install_default()
        self._use_active_slot()
        add_user(vit, self)

    def extra_repr(self) -> str:
        """The methods with their settings, and the degree, for `repr(model)`."""
        configs = (self.reduce_config, self.adapt_config, self.decode_config)
        methods = zip(("reduce", "adapt", "decode"), configs, strict=True)
        lines = [f"{kind}={method}," for kind, method in methods if method is not None]
        return "\n".join([*lines, f"degree={self.degree} of 0 to {self.degrees[-1]}"])

    # The forward pass.

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images [B, 3, H, W], or of clips [B, T, 3, H, W], at the present degree.

        Returns:
            [B, num_classes]; with a decoder [B, num_classes, h, w], at the decoder's resolution.
        """
        return self._logits(self._last_tokens(images))

    def _last_tokens(self, images: Tensor, *, with_map: bool = False) -> Tokens:
        """The tokens that leave the last block, tracked if a decoder or a map reads them."""
        run_block, depth = self._block_function(), len(self.anatomy.blocks)
        skips = self.skip_unread_patches and self._reads_prefix_only and not with_map
        # A decoder and a map need every position back.
        track = with_map or self.decoder is not None
        tokens = self._first_tokens(images, track=track, follow_fused=False)
        for layer in range(1, depth + 1):
            tokens = run_block(layer, tokens, prefix_only=skips and layer == depth).tokens
        return tokens

    def _first_tokens(self, images: Tensor, *, track: bool, follow_fused: bool) -> Tokens:
        """The tokens that enter the first block."""
        tokens = self.anatomy.embed(images)
        if track:
            tokens = tokens.with_tracking(follow_fused=follow_fused)
        if self._protected is not None and self.degree:
            tokens = protect(tokens, self._protected, self.reducer)
        return tokens

    @contextmanager
    def protecting(self, mask: Tensor) -> Iterator[None]:
        """Leave chosen patches alone while a block of code runs.

        Each of them stays a token of its own: it is not dropped, merges into none, and absorbs
        none, and every FFN processes it. Fewer tokens are left to reduce, so a degree may reduce
        less. In a batch, methods that drop or merge protect as many patches in every image as in
        the one with the most.

        Args:
            mask: Bool, True for patches to protect: [rows, columns] for all images, or
                [B, rows, columns]. `patches_in_boxes` makes one from boxes. For clips those of one
                time step, or of all of them one below the other.

        Raises:
            ValueError: If it is no such mask, the reduction method cannot protect patches, or an
                adapter needs the grid of patches.

        Example:
            >>> import timm, torch, tokendial as td
            >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)
            >>> model = td.wrap(vit, reduce=td.ToMe(r=6)).eval()
            >>> mask = td.patches_in_boxes([[(0, 0, 32, 32)]], (64, 64), (4, 4))
            >>> with model.protecting(mask):
            ...     logits = model(torch.randn(1, 3, 64, 64))
        """
        check_mask(mask, self.reducer)
        in_place = self.reducer is not None and self.reducer.protects_in_place
        if self.adapter.needs_grid and not in_place:
            raise ValueError(
                f"{type(self.adapt_config).__name__} needs the grid of patches, which protected "
                "ones leave."
            )
        before, self._protected = self._protected, mask
        try:
            yield
        finally:
            self._protected = before

    def steps(
        self,
        images: Tensor,
        *,
        track: bool = False,
        dropped: Literal["own", "fused"] = "fused",
        needs: frozenset[str] = frozenset(),
    ) -> Iterator[Step]:
        """Run block by block.

        Args:
            images: [B, 3, H, W], normalised.
            track: Track which token holds each original position.
            dropped: With `track`, the features of positions whose tokens were given up for a fused
                token, see `feature_map`.
            needs: By-products of attention (see `tokendial.attention.BY_PRODUCTS`) to return for
                every block, besides those that the reducer needs.

        Yields:
            The state after each block, before the final norm.

        Raises:
            ValueError: If `dropped` is neither "own" nor "fused".
        """
        if dropped not in ("own", "fused"):
            raise ValueError(f"dropped must be one of own, fused, got {dropped!r}.")
        run_block = self._block_function()
        tokens = self._first_tokens(images, track=track, follow_fused=dropped == "fused")
        for layer in range(1, len(self.anatomy.blocks) + 1):
            step = run_block(layer, tokens, needs)
            tokens = step.tokens
            yield step

    def _block_function(self) -> Callable[..., Step]:
        """`BlockRunner.run` with the present degree, methods and settings."""
        # The version is never negative. torch.compile notices changes of attributes that decide
        # something, but not changes of hooks: this statement makes it compile anew for other hooks.
        if self.hook_version < 0:
            raise RuntimeError("hook_version is negative: it is set by update_hook_version() only.")
        reducer = self.reducer if self.degree else None
        runner = BlockRunner(
            self.anatomy, reducer, self.degree, self.adapter, self.attention_kernel
        )
        if self.checkpoint_activations and self.training:
            return partial(checkpoint, runner.run, use_reentrant=False)
        return runner.run

    @property
    def _reads_prefix_only(self) -> bool:
        """Whether nothing reads the patch tokens that leave the last block."""
        if self.adapter.needs_grid or self.adapter.depends_on_other_tokens:
            return False
        return self.decoder is None and self.anatomy.head_reads_prefix_only

    def _logits(self, tokens: Tokens) -> Tensor:
        if self.decoder is None:
            return self.anatomy.classify(tokens)
        logits: Tensor = self.decoder(restored_map(self.anatomy, tokens, norm=True))
        return logits

    def forward_at(self, images: Tensor, degrees: Sequence[int]) -> Tensor:
        """Logits of a batch in which each image has its own degree; each degree runs once.

        Attach a compensator with `merge=False`, so that turning the dial is free.

        Args:
            images: [B, 3, H, W].
            degrees: The degree of each image.

        Raises:
            ValueError: If there are not as many degrees as images, or one is not in `degrees`.
        """
        before = self.degree
        try:
            return run_by_degree(self, self.set_degree, images, degrees)
        finally:
            self.set_degree(before)

    def forward_pass(self, images: Tensor) -> ForwardPass:
        """Logits, features and the tokens of every layer: what the losses of methods read."""
        steps = self.steps(images, track=self.decoder is not None, dropped="own")
        tokens = [step.tokens for step in steps]
        last = tokens[-1]
        read = restored_map(self.anatomy, last, norm=True) if self.decoder else None
        logits = self.decoder(read) if self.decoder else self.anatomy.classify(last)
        return ForwardPass(self.degree, logits.float(), self.anatomy.norm(last.x), tokens, read)

    # Features.

    def feature_map(
        self,
        images: Tensor,
        layer: int | None = None,
        *,
        dropped: Literal["own", "fused"] = "own",
    ) -> Tensor:
        """Features at every patch; merged tokens are copied back to all their positions.

        Args:
            images: [B, 3, H, W], normalised.
            layer: The block whose output to return, counted from 1, without the final norm; None:
                the output of the last block, with the final norm.
            dropped: What positions get whose tokens were given up for a fused token: "own" for the
                features that they had then, "fused" for those of the fused token. Tokens that were
                dropped without a fused one always keep their own features.

        Returns:
            [B, D, rows, columns]; the class token and other prefix tokens are left out. Of clips:
            [B, T, D, rows, columns] (T: frames, or time steps where frames were joined).

        Raises:
            ValueError: If there is no such layer.
        """
        layers = None if layer is None else [layer]
        return self.feature_maps(images, layers, dropped=dropped, norm=layer is None)[0]

    def feature_maps(
        self,
        images: Tensor,
        layers: Sequence[int] | None = None,
        *,
        dropped: Literal["own", "fused"] = "own",
        norm: bool = False,
    ) -> list[Tensor]:
        """Feature maps after several blocks in one run; `forward_intermediates` is timm's form.

        Args:
            images: [B, 3, H, W], normalised.
            layers: Blocks, counted from 1, each once; None: the last one.
            dropped: As in `feature_map`.
            norm: Apply the final norm to each.

        Returns:
            For each layer, in the order of `layers`, a map as `feature_map` returns it.

        Raises:
            ValueError: If there is no such layer.
        """
        steps = self.steps(images, track=True, dropped=dropped)
        return collect_maps(self.anatomy, steps, layers, norm=norm)

    def embeddings(self, images: Tensor) -> Tensor:
        """Pooled features of images: what the head reads, or what a model without a head returns.

        A decoder is not run: the embeddings are those of its backbone. Of two heads that read
        different tokens, as in distilled DeiT, it is the mean of both.

        Args:
            images: [B, 3, H, W], normalised; of a video model clips [B, T, 3, H, W].

        Returns:
            [B, D].

        Raises:
            ValueError: If the model does not pool its tokens (timm's `global_pool=""`).
        """
        return pooled_features(self.anatomy, self._last_tokens(images))

    def logits_and_embeddings(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` and `embeddings` return, from one run of the blocks."""
        outputs = self.logits_and_features(images, embeddings=True)
        return outputs["logits"], outputs["embeddings"]

    def logits_and_features(
        self, images: Tensor, *, embeddings: bool = False, feature_map: bool = False
    ) -> dict[str, Tensor]:
        """Logits, and further outputs by their names, from one run of the blocks.

        Args:
            images: [B, 3, H, W], normalised.
            embeddings: Also give what `embeddings` returns.
            feature_map: Also give what `feature_map` returns.
        """
        tokens = self._last_tokens(images, with_map=feature_map)
        outputs = {"logits": self._logits(tokens)}
        if embeddings:
            outputs["embeddings"] = pooled_features(self.anatomy, tokens)
        if feature_map:
            outputs["feature_map"] = restored_map(self.anatomy, tokens, norm=True)
        return outputs

    # What timm's models have.

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def embed_dim(self) -> int:
        """Width of a token."""
        return self.anatomy.shape.embed_dim

    @property
    def num_features(self) -> int:
        """Width of the features that `forward_features` returns; the same as `embed_dim`."""
        return self.embed_dim

    @property
    def num_classes(self) -> int:
        """Width of the logits; 0 without a head or decoder."""
        return self.decode_config.num_classes if self.decode_config else head_size(self.anatomy)

    @property
    def pretrained_cfg(self) -> Any:
        """timm's facts of the backbone, which `timm.data.resolve_model_data_config(model)` reads.

        Among them are mean and deviation of its images. Models of transformers have none.
        """
        return self.vit.pretrained_cfg

    @property
    def default_cfg(self) -> Any:
        """`pretrained_cfg` by its older name."""
        return self.vit.default_cfg

    def forward_features(self, images: Tensor) -> Tensor:
        """Features of all tokens after the last block and the final norm, reductions undone.

        At degree 0 they are those of timm's `forward_features`. At other degrees the shape is the
        same: a merged token is copied back to all its positions.

        Returns:
            [B, N, D] with all prefix and patch tokens; of clips whose frames run by themselves
            [B * T, N, D].
        """
        *_, last = self.steps(images, track=True, dropped="own")
        return self.anatomy.norm(last.tokens.restore_positions())

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of the features that `forward_features` returns.

        Args:
            features: [B, N, D].
            pre_logits: Return what the last linear layer reads instead.

        Raises:
            ValueError: If the backbone is not of timm, or the model has a decoder.
        """
        method = timm_method(self.vit, "forward_head", self.decoder)
        logits: Tensor = method(features, pre_logits=pre_logits)
        return logits

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of several blocks in one run, as timm's models return them.

        All reductions are undone. Unlike all else here, `indices` count blocks from 0, as timm's
        do; `feature_maps` counts from 1.

        Args:
            images: [B, 3, H, W], normalised.
            indices: Blocks counted from 0, negative ones from the end; a number n: the last n
                blocks; None: all.
            return_prefix_tokens: Return a pair (patches, prefix tokens) for each block.
            norm: Apply the final norm to each.
            stop_early: Stop after the last block of `indices`; the final features are then those
                after that block.
            output_fmt: "NCHW" for maps [B, D, rows, columns], "NLC" for patches [B, L, D].
            intermediates_only: Return the list alone.

        Returns:
            The features that `forward_features` returns, and a list of the blocks' outputs in the
            order of the blocks.

        Raises:
            ValueError: If there is no such block, or `output_fmt` is another one.
        """
        return collect_intermediates(
            self.anatomy,
            self.steps(images, track=True, dropped="own"),
            indices,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            stop_early=stop_early,
            output_fmt=output_fmt,
            intermediates_only=intermediates_only,
        )

    def get_classifier(self) -> Any:
        """The head as timm's `get_classifier` returns it; the decoder if there is one."""
        if self.decoder is not None:
            return self.decoder
        return timm_method(self.vit, "get_classifier", None)()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the active adapter a new head, which trains; see timm's `reset_classifier`.

        Args:
            num_classes: Width of the logits; 0 removes the head.
            global_pool: How tokens are pooled before the head; None: as before.

        Raises:
            ValueError: If the backbone is not of timm, takes clips, or the model has a decoder; or
                the adapter needs a head that reads the class token, and `global_pool` is another.
        """
        reset_head(self.anatomy, self.adapter, self.decoder, num_classes, global_pool)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.checkpoint_activations = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm excludes from weight decay, as in `named_parameters()`."""
        names: set[str] = getattr(self.vit, "no_weight_decay", set)()
        return {f"vit.{name}" for name in names}

    # The dial.

    @property
    def degrees(self) -> tuple[int, ...]:
        """Degrees that the dial offers, from 0 (no reduction) to the cheapest. With a compensator:
        those that it reaches."""
        offered = self._reducer_degrees
        return offered[: self.compensation.steps + 1] if self.compensation else offered

    @property
    def _reducer_degrees(self) -> tuple[int, ...]:
        return self.reducer.degrees if self.reducer else (0,)

    @property
    def degree(self) -> int:
        """Position of the dial; setting it turns the dial, as `set_degree` does."""
        return self._degree

    @degree.setter
    def degree(self, degree: int) -> None:
        self.set_degree(degree)

    def set_degree(self, degree: int) -> None:
        """Turn the dial.

        Raises:
            ValueError: If it is not one of `degrees`, or an attached compensator does not reach it.
        """
        check_degree(degree, self._reducer_degrees)
        degree = int(degree)
        if self.compensation:
            self.compensation.set_degree(degree)
        self._degree = degree

    def cost(self, degree: int | None = None) -> Cost:
        """Parameters, multiply-accumulates and tokens of one image or clip of the configured size.

        Tokens are those of one sequence. For video models whose frames run by themselves, it is a
        frame.

        Args:
            degree: Degree to count at; None: the present one.

        Raises:
            ValueError: If `degree` is not one of `degrees`.
        """
        before = self.degree
        if degree is not None:
            check_degree(degree, self._reducer_degrees)
            # Not set_degree: a compensator's weights need not change to be counted.
            self._degree = int(degree)

        def run(images: Tensor) -> list[int]:
            steps = list(self.steps(images, track=self.decoder is not None, dropped="own"))
            self._logits(steps[-1].tokens)
            return [step.tokens.x.shape[1] for step in steps]

        heads = [*self.anatomy.heads, *([self.decoder] if self.decoder else [])]
        shape = self.anatomy.input_shape
        try:
            return model_cost(self, run, degree=self.degree, input_shape=shape, heads=heads)
        finally:
            self._degree = before

    # Adapters.

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all adapters; "default" is the one given to `wrap`."""
        return self._adapters.names

    @property
    def active_adapter(self) -> str:
        """Name of the active adapter."""
        return self._adapters.active

    def add_adapter(
        self,
        name: str,
        adapt: AdapterConfig,
        *,
        num_classes: int | None = None,
        decode: DecoderConfig | None = None,
    ) -> None:
        """Add an adapter with its own head or decoder; `set_adapter` makes it active.

        All adapters share the backbone, which is in memory once. Each adapter has its own copy of
        what it trains besides: weights of the backbone (`FullFineTuning`, `BitFit`, `LastBlocks`)
        and weights of the reducer, if it has some. Only the active adapter is part of
        `parameters()`, `state_dict()` and `cost()`.

        Args:
            name: A name that is not taken.
            adapt: Fine-tuning method, such as `LoRA(rank=8)`.
            num_classes: Width of its head; None: that of the head given to `wrap`.
            decode: Its decoder; None: a fresh one like that given to `wrap`, if one was.

        Raises:
            ValueError: If the name is taken, the method does not fit, there is no head to replace,
                a decoder would stand beside a head, adapters are merged, the method given to `wrap`
                trains the shared weights, or another wrapped model has the backbone.
        """
        check_method("adapt", adapt)
        check_method("decode", decode)
        slot = self._adapters.new_slot(name, adapt, num_classes, decode)
        with self.own_weights():
            self._adapters.add(name, slot, user=self)

    def set_adapter(self, name: str) -> None:
        """Make an adapter active, with its head or decoder.

        Raises:
            ValueError: If there is none of that name, or adapters are merged.
        """
        self._adapters.check_known(name)
        if name == self.active_adapter:
            return
        self._adapters.check_unmerged()
        with self.own_weights():
            self._adapters.activate(name)
            self._use_active_slot()

    def delete_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            ValueError: If there is none of that name, or it is active or the default.
        """
        self._adapters.delete(name)

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that train: adapters and heads, or everything in full fine-tuning."""
        return (p for p in self.parameters() if p.requires_grad)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, in the words of PEFT's method of that name."""
        trainable = sum(p.numel() for p in self.trainable_parameters())
        total = sum(p.numel() for p in self.parameters())
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
        )

    def merge_adapters(self) -> None:
        """Add a linear adapter (LoRA, SSF, FacT) to the backbone's weights, so that it is free.

        Outputs stay the same up to rounding. The original weights stay in memory.

        Raises:
            ValueError: If the adapter is not linear, or is merged already.
        """
        if self.adapter.merged:
            raise ValueError("the adapters are merged already.")
        with self.own_weights():
            self.adapter.merge()

    def unmerge_adapters(self) -> None:
        """Undo `merge_adapters`; the weights are then the original ones, to the bit.

        Raises:
            ValueError: If nothing is merged.
        """
        if not self.adapter.merged:
            raise ValueError("the adapters are not merged.")
        with self.own_weights():
            self.adapter.unmerge()

    def unwrap(self, *, merge: bool = True) -> nn.Module:
        """Give the backbone back as an ordinary model; this model cannot be used any more.

        Weights that were trained in place (heads, `FullFineTuning`, `BitFit`, `LastBlocks`) stay as
        they are. Which parameters train is again as it was before `wrap`.

        Args:
            merge: Merge the active adapter, so that the backbone has the logits of this model at
                degree 0. If False, the backbone comes without the adapter.

        Returns:
            `model.vit`.

        Raises:
            ValueError: If the adapter cannot be merged, there is a decoder that would be lost (both
                with `merge` only), or a compensator is attached. The model is then as it was.
        """
        if self.compensation:
            raise ValueError("a compensator is attached: detach it first.")
        self._adapters.leave_backbone(merge=merge)
        vit: nn.Module = self.vit
        remove_user(vit, self)
        del self.vit, self.anatomy, self._adapters
        return vit

    def release_backbone(self) -> None:
        """Give the backbone back as `wrap` found it; the model cannot be used any more."""
        slot = self._adapters.default_slot
        if slot.config is not None:
            slot.remove(self.vit)
        remove_user(self.vit, self)

    def _use_active_slot(self) -> None:
        """Make the modules of the active adapter those of the model."""
        slot = self._adapters.active_slot
        self.adapt_config, self.decode_config = slot.config, slot.decode
        self.adapter, self.reducer, self.decoder = slot.adapter, slot.reducer, slot.decoder
        self.update_hook_version()

    # The backbone and its head.

    @property
    def backbone(self) -> Backbone:
        """How to build the backbone again, with its present head and settings."""
        return self._source.describe(self.anatomy)

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the classification heads in `vit`; none if it has no head."""
        return head_names(self.anatomy)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "vit" and "vit" in self.__dict__.get("_modules", ()):
            self._replace_backbone(value)
        super().__setattr__(name, value)

    def _replace_backbone(self, vit: nn.Module) -> None:
        """Prepare for another backbone; a ValueError if it cannot replace the present one."""
        if getattr(self, "_is_replica", False):  # torch.nn.DataParallel sets the replica's part
            self.anatomy = type(self.anatomy)(vit)
            return
        anatomy = anatomy_of(vit)
        if self.compensation:
            raise ValueError("a compensator is attached: detach it before vit is replaced.")
        self._adapters.check_replaceable(anatomy)
        check_sharing(vit, self, adapts=self._adapters.changes_backbone)
        self._adapters.replace_backbone(anatomy)
        self.anatomy, self.fingerprint = anatomy, fingerprint(vit)
        remove_user(self.vit, self)
        add_user(vit, self)

    # Weights and hooks that a compensator changes.

    @contextmanager
    def own_weights(self) -> Iterator[None]:
        """Run a block of code on the model's own weights, without an attached compensator."""
        compensation, self.compensation = self.compensation, None
        if compensation:
            compensation.stop()
        try:
            yield
        finally:
            self.compensation = compensation
            if compensation:
                compensation.start()
            self.update_hook_version()

    def update_hook_version(self) -> None:
        """Record which hooks are in the backbone as a number, `hook_version`.

        `torch.compile` does not notice other hooks, but it notices another number.
        """
        handles = (handle for module in self.vit.modules() for handle in module._forward_hooks)
        self.hook_version = abs(hash(tuple(handles)))

    # Saving and loading.

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the weights that train, those of the adapter, and the configuration; see `load`.

        A frozen backbone is saved by its name only, unless its weights are random.

        Raises:
            ValueError: If adapters are merged, or a head stands beside the decoder.
        """
        if self.adapter.merged:
            raise ValueError("merged adapters cannot be saved: call unmerge_adapters() first.")
        check_headless(self.anatomy, self.decode_config)
        with self.own_weights():
            tensors = self.saved_tensors()
            calibration = self.reducer.calibration if self.reducer else None
            trained = self.reducer.trained_degrees if self.reducer else None
            SavedModel(
                folder=Path(directory),
                backbone=self.backbone,
                whole=all(f"vit.{name}" in tensors for name, _ in self.vit.named_parameters()),
                fingerprint=self.fingerprint,
                degree=self.degree,
                calibration=dataclasses.asdict(calibration) if calibration else None,
                trained_degrees=list(trained) if trained else None,
                reduce=self.reduce_config,
                adapt=self.adapt_config,
                decode=self.decode_config,
                tensors=tensors,
            ).write()

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub; returns the address."""
        return push_files(self.save_pretrained, repo_id, private=private, token=token)

    def save_adapter(self, name: str, directory: str | Path) -> None:
        """Write one adapter with its head, as `save_pretrained` does for the active one."""
        active = self.active_adapter
        self.set_adapter(name)
        try:
            self.save_pretrained(directory)
        finally:
            self.set_adapter(active)

    def load_adapter(
        self,
        name: str,
        directory: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> None:
        """Add an adapter that `save_adapter` or `save_pretrained` wrote; `set_adapter` to use it.

        Args:
            name: A name that is not taken.
            directory: Local folder, or "owner/name" of a repository on the Hugging Face hub.
            revision: Branch, tag or commit of the repository on the hub; None: its main branch.
            token: Access token of the hub; None: the one that `hf auth login` stored, if any.

        Raises:
            ValueError: If the folder holds no saved model, or one of another backbone or reduction
                method. The model is then as it was.
        """
        saved = SavedModel.read(directory, revision=revision, token=token)
        adapt = saved.check_adapter(self.reduce_config, self.fingerprint)
        active = self.active_adapter
        with config_errors(saved.folder), self.own_weights():
            num_classes = saved.head_size(self.head_names)
            self.add_adapter(name, adapt, num_classes=num_classes, decode=saved.decode)
            try:
                self.set_adapter(name)
                saved.load_trained(self, trained_tensors(self, self.adapter, self.decoder))
                saved.restore_dial(self.reducer)
            except BaseException:
                self.set_adapter(active)
                self.delete_adapter(name)
                raise
            self.set_adapter(active)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Tensors that a saved model holds: what was trained, or all if weights are random."""
        trained = trained_tensors(self, self.adapter, self.decoder)
        random = self.backbone.weights is None
        return dict(self.named_parameters()) | trained if random else trained

    def _load_from_state_dict(self, *args: Any) -> None:
        # Merged weights are replaced when the kept ones come back: what is loaded would be lost.
        self._adapters.check_unmerged()
        if self.compensation and self.compensation.in_weights:
            raise ValueError("a compensator is in the weights: detach it before others are loaded.")
        super()._load_from_state_dict(*args)
