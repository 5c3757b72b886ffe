"""`wrap`: from a ViT to a model with a dial."""

from torch import nn

from tokendial.adapt.base import AdapterConfig
from tokendial.backbones import Backbone
from tokendial.decode import DecoderConfig
from tokendial.model.arguments import check_bare, check_method
from tokendial.model.dial_vit import DialViT
from tokendial.reduce.base import ReducerConfig


def wrap(
    vit: nn.Module,
    *,
    reduce: ReducerConfig | None = None,
    adapt: AdapterConfig | None = None,
    decode: DecoderConfig | None = None,
    backbone: Backbone | None = None,
) -> DialViT:
    """Give a ViT token reduction, an adapter and the dial.

    Args:
        vit: A model of timm (VisionTransformer, Eva, NaFlexVit; for clips those of `video_vit` and
            videomae_*), the VisionTransformer of torchvision or open_clip, or a model of
            transformers: ViT, DeiT, DINOv2, DINOv3, I-JEPA, VitPose, YOLOS, the encoder of MAE
            (on all patches: nothing is masked), or the image tower of CLIP, SigLIP, SigLIP 2,
            OWL-ViT or OWLv2. It stays `model.vit`. With an adapter its weights are frozen as the
            fine-tuning method says.
        reduce: Reduction method, such as `ToMe(r=8)`; None: no tokens are removed.
        adapt: Fine-tuning method, such as `DenseAdapter(dim=32)`; None: no adapter, and which
            weights train stays as it is.
        decode: Decoder for dense tasks, such as `DARDecoder()`, on a `vit` without a head; None:
            the head of `vit` gives the logits.
        backbone: How to build `vit` again, written into saved models; None: read from `vit`.

    Returns:
        A module with the logits of `vit` at degree 0. Without a head it returns the pooled
        features of `vit`, or, if it does not pool, its class token or else the mean of its patches;
        with a decoder the decoder's logit maps.

    Raises:
        ValueError: If the model is not supported, a method does not fit it, or another wrapped
            model has it and one of the two brings adapters. `vit` is then as it was.

    Example:
        >>> import timm, torch
        >>> from tokendial import ToMe
        >>> vit = timm.create_model("vit_tiny_patch16_224", depth=2)
        >>> model = wrap(vit, reduce=ToMe(r=8))
        >>> model(torch.zeros(1, 3, 224, 224)).shape
        torch.Size([1, 1000])
        >>> model.cost().tokens_per_layer
        (189, 181)
    """
    check_bare(vit, DialViT)
    for kind, method in (("reduce", reduce), ("adapt", adapt), ("decode", decode)):
        check_method(kind, method)
    return DialViT(vit, reduce=reduce, adapt=adapt, decode=decode, backbone=backbone)
