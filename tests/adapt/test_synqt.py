"""SynQT: the model equals the authors' code; queries read tokens, which do not notice them."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from examples import golden_vit, images, perturbed, split, tiny_vit
from zoo import EVERY, backbone

import tokendial as td
from tokendial.adapt.synqt import FeatureJoin

# Parts of the authors' names, in order, and of ours.
NAMES = (
    (r"synqt\.head_norm", "vit.norm"),
    (r"synqt\.q$", "adapter.vectors"),
    (r"synqt\.feat_scale", "adapter.feature_scale"),
    (r"synqt\.prompt_ffn\.(\d+)", r"adapter.synthesis.\1.first"),
    (r"synqt\.qsm_block\.(\d+)\.mlp", r"adapter.synthesis.\1.last"),
    (r"synqt\.qsm_block\.(\d+)\.attn_scale", r"adapter.synthesis.\1.attention_scale"),
    (r"synqt\.qsm_block\.(\d+)\.attn\.(q|kv)_norm", r"adapter.synthesis.\1.attention.norm_\2"),
    (r"synqt\.qsm_block\.(\d+)\.attn\.([qkv])_proj", r"adapter.synthesis.\1.attention.\2"),
    (r"synqt\.qsm_block\.(\d+)\.attn\.proj", r"adapter.synthesis.\1.attention.proj"),
    (r"synqt\.qsm_block\.(\d+)", r"adapter.synthesis.\1"),
    (r"synqt\.mlp", "adapter.join.bottleneck"),
    (r"synqt\.out_norm", "adapter.join.norm"),
    (r"synqt\.out_combine\.get_weight\.fc1", "adapter.join.gates"),
    (r"mlp\.fc1", "down"),
    (r"mlp\.fc2", "up"),
    (r"^head\.", "vit.head."),
)


def our_name(name):
    for theirs, ours in NAMES:
        name = re.sub(theirs, ours, name)
    return name


def model_of_the_reference():
    meta, tensors, vit = golden_vit("synqt_vit")
    settings = meta["settings"]
    adapt = td.SynQT(
        queries=settings["token_nums"],
        feature_scale=settings["feat_scale"],
        attention_scale=settings["attn_scale"],
        ffn_scale=settings["ffn_scale"],
    )
    model = td.wrap(vit, adapt=adapt).eval()
    extra = {our_name(name): value for name, value in split(tensors, "extra.").items()}
    assert extra.keys() == {n for n, _ in model.named_parameters() if "head" not in n} - {
        n for n, p in model.named_parameters() if not p.requires_grad
    }
    model.load_state_dict(model.state_dict() | extra)
    return model, tensors


def randomised(adapt=None, reduce=None, **kwargs):
    adapt = adapt or td.SynQT(queries=2, dim=6, attention_dim=3)
    torch.manual_seed(0)
    model = td.wrap(tiny_vit(**kwargs), reduce=reduce, adapt=adapt)
    perturbed(model.adapter, std=0.1)
    return model


@torch.no_grad()
def test_logits_and_features_equal_the_reference():
    model, tensors = model_of_the_reference()
    features = tensors["output.features"]
    close = {"atol": 1e-4, "rtol": 0}
    torch.testing.assert_close(model.embeddings(tensors["input"]), features, **close)
    torch.testing.assert_close(model(tensors["input"]), tensors["output.logits"], **close)


def test_gradients_equal_the_reference():
    model, tensors = model_of_the_reference()
    loss = F.cross_entropy(model(tensors["input"]), tensors["input.labels"])
    torch.testing.assert_close(loss, tensors["output.loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    for name, expected in split(tensors, "output.grad.").items():
        found = model.get_parameter(our_name(name)).grad
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_the_tokens_of_the_backbone_do_not_notice_the_queries():
    plain, model = td.wrap(tiny_vit(), reduce=td.ToMe(r=6)), randomised(reduce=td.ToMe(r=6))
    for without, step in zip(plain.steps(images()), model.steps(images()), strict=True):
        own = without.tokens.x[:, 1:] if step.layer == 4 else without.tokens.x
        assert torch.equal(step.tokens.x[:, -own.shape[1] :], own)
    assert not torch.allclose(step.tokens.x[:, 0], without.tokens.x[:, 0], atol=0.1)


def kept_by_autograd(model):
    """Bytes that autograd keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.train()(images(1)).sum()
    return sum(storage.nbytes() for storage in kept.values())


def test_training_keeps_few_activations():
    model = randomised()
    seen = []
    for block in model.vit.blocks:
        block.mlp.fc1.register_forward_hook(
            lambda *a: seen.append((a[2].shape[1], a[2].requires_grad))
        )
    model.train()(images()).sum().backward()
    assert seen == [(2, True), (65, False)] * 4
    assert all(p.grad is not None for p in model.trainable_parameters())
    others = (td.AdaptFormer(dim=6), td.LoRA(rank=3), td.VPT(prompts=2))
    ours = kept_by_autograd(model)
    assert all(ours < 0.6 * kept_by_autograd(td.wrap(tiny_vit(), adapt=a)) for a in others)


@pytest.mark.parametrize("weigh", [True, False])
@torch.no_grad()
def test_queries_weigh_merged_tokens_as_attention_does(weigh):
    """Patches that are all equal merge without loss, if attention knows how many they are."""
    same = images(1)[:, :, :1, :1].expand(2, -1, 32, 32)
    reduce = td.ToMe(r=9, proportional_attention=weigh)
    model = randomised(reduce=reduce).eval()
    model.vit.pos_embed.zero_()
    reduced = model(same)
    model.set_degree(0)
    assert torch.allclose(reduced, model(same), atol=1e-4) == weigh


@torch.no_grad()
def test_queries_read_what_a_reduction_leaves():
    model = randomised(reduce=td.EViT(keep_rate=0.5, layers=(1,), rest="drop")).eval()
    reduced = model(images())
    model.set_degree(0)
    assert (model(images()) - reduced).abs().max() > 1e-3


@torch.no_grad()
def test_a_query_of_a_layer_reads_no_other_layer_when_its_factor_is_zero():
    model = randomised().eval()
    model.adapter.feature_scale.zero_()
    before = [step.tokens.aside for step in model.steps(images())][2]
    model.adapter.vectors[0] += 1.0
    after = [step.tokens.aside for step in model.steps(images())][2]
    for name, found in before.items():
        assert torch.equal(after[name][:, 1:], found[:, 1:])
        assert not torch.equal(after[name][:, 0], found[:, 0])


def test_without_dropout_training_computes_the_same():
    model = randomised(td.SynQT(queries=2, dim=6, attention_dim=3, dropout=0.0, drop_path=0.0))
    assert torch.equal(model.train()(images()), model.eval()(images()))
    model = randomised(td.SynQT(queries=2, dim=6, attention_dim=3, drop_path=0.0))
    assert not torch.equal(model.train()(images()), model.eval()(images()))


def test_drop_path_leaves_out_whole_features_but_never_the_first():
    torch.manual_seed(0)
    join = FeatureJoin(td.SynQT(dim=2, dropout=0.0, drop_path=0.25), 4, 2).train()
    for parameter in (join.norm.weight, *join.bottleneck.up.parameters()):
        torch.nn.init.zeros_(parameter)
    x = torch.stack([torch.ones(1000, 4), torch.full((1000, 4), 2.0)], dim=1)
    gate = join.activation(join.gates(x[:1, 0])).tanh().item()
    second = 2 * join(x) - 1
    left_out = second.abs().amax(dim=1) < 1e-5
    kept = second[~left_out]
    torch.testing.assert_close(kept, torch.full_like(kept, 2 * gate / 0.75))
    assert left_out.sum().item() == pytest.approx(250, abs=45)


def test_only_the_modules_the_final_norm_and_the_head_train():
    model = randomised().train()
    model(images()).square().sum().backward()
    trained = {n for n, p in model.vit.named_parameters() if p.grad is not None}
    assert trained == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


@torch.no_grad()
def test_it_is_saved_with_the_norm(tmp_path):
    model = randomised(reduce=td.ToMe(r=6)).eval()
    perturbed(model.vit.norm, std=0.3)
    model.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path, vit=tiny_vit())(images()), model(images()))


@torch.no_grad()
def test_the_norm_of_one_adapter_is_not_that_of_another():
    model = td.wrap(tiny_vit()).eval()
    before = model(images())
    model.add_adapter("pets", td.SynQT(queries=1, dim=4))
    model.set_adapter("pets")
    perturbed(model.vit.norm, std=0.3)
    model.set_adapter("default")
    assert torch.equal(model(images()), before)


REFUSED = {
    "average pooling": lambda: {"vit": tiny_vit(global_pool="avg")},
    "no pooling": lambda: {"vit": tiny_vit(global_pool="")},
    "no class token": lambda: {"vit": tiny_vit(global_pool="avg", class_token=False)},
    "two heads": lambda: {"vit": backbone("deit distilled")[0]},
    "two heads of transformers": lambda: {"vit": backbone("hf deit teacher")[0]},
    "attention pooling": lambda: {"vit": backbone("naflex map")[0]},
    "a decoder": lambda: {
        "vit": tiny_vit(num_classes=0),
        "decode": td.LinearDecoder(num_classes=3),
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_heads_are_refused(name):
    with pytest.raises(ValueError, match="SynQT needs a model with one head, or none, that reads"):
        td.wrap(**REFUSED[name](), adapt=td.SynQT())


def test_its_new_head_reads_the_class_token_too():
    model = randomised()
    model.reset_classifier(3)
    assert model(images()).shape == (2, 3)
    with pytest.raises(ValueError, match="global_pool must be token or None, got 'avg'"):
        model.reset_classifier(3, global_pool="avg")


def test_a_model_without_a_final_norm_is_refused():
    vit = tiny_vit()
    vit.norm = torch.nn.Identity()
    with pytest.raises(ValueError, match="SynQT trains the norm after the last block, which"):
        td.wrap(vit, adapt=td.SynQT())


def test_two_of_them_are_refused():
    both = td.Combined(methods=[td.SynQT(queries=1), td.SynQT(queries=2)])
    with pytest.raises(ValueError, match="2 of them replace the class token"):
        td.wrap(tiny_vit(), adapt=both)


@torch.no_grad()
def test_combined_with_a_method_that_does_nothing_it_is_as_alone():
    alone = randomised().eval()
    both = td.Combined(methods=[alone.adapt_config, td.AdaptFormer(dim=4)])
    model = td.wrap(tiny_vit(), adapt=both).eval()
    model.adapter.methods[0].load_state_dict(alone.adapter.state_dict())
    assert torch.equal(model(images()), alone(images()))


FITS = {
    "vit", "augreg", "deit", "deit3", "dino", "dinov2", "dinov2 registers", "clip", "rope mixed",
    "eva02 post-norm", "naflex vit", "naflex rope mixed", "hf vit", "hf vit model", "hf deit",
    "hf deit model", "hf dinov2 swiglu", "hf dinov2 backbone", "hf dinov2 registers backbone",
    "hf clip", "hf clip projection", "hf dinov3", "hf dinov3 gated", "hf dinov3 backbone", "hf mae",
    "hf owlvit", "hf owlv2", "hf yolos", "hf yolos mid positions", "torchvision",
    "torchvision representation",
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_backbones_whose_head_reads_the_class_token(name):
    """The trained norm has to be the one before the head: one before the blocks would need
    gradients through them.
    """
    vit, size = backbone(name)
    adapt = td.SynQT(queries=2, dim=4, attention_dim=2)
    if name not in FITS:
        with pytest.raises(ValueError, match="reads the class token alone"):
            td.wrap(vit, reduce=td.ToMe(r=2), adapt=adapt)
        return
    model = td.wrap(vit, reduce=td.ToMe(r=2), adapt=adapt).train()
    model(images(2, *size)).square().sum().backward()
    for parameter in model.trainable_parameters():
        assert parameter.grad.abs().sum() > 0
    assert not next(model.steps(images(2, *size))).tokens.x.requires_grad
    for degree in (0, 2):
        model.set_degree(degree)
        assert model.eval()(images(2, *size)).isfinite().all()


def test_parameters_and_cost_on_vit_base():
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=0)
        cost = td.wrap(vit, adapt=td.SynQT(queries=4)).cost()

    def bottleneck(dim):
        return 2 * 768 * dim + dim + 768

    of_a_layer = 2 * bottleneck(48) + 4 * bottleneck(8) + 4 * 2 * 768 + 2 + 4 * 768
    joined = bottleneck(48) + 2 * 768 + 36 * 769
    assert cost.trainable_params == 12 * of_a_layer + 1 + joined + 2 * 768
    assert round(cost.gmacs, 2) == 17.95
