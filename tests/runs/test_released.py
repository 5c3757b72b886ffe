"""DAR's released fine-tuned files become runs."""

import timm
import torch
import yaml
from decode.test_decoders import reference_model
from examples import golden, split
from PIL import Image
from safetensors.torch import save_file

from tokendial.runs import Run

CASE, TENSORS = golden("dar_seg")
CFG = CASE["settings"]["backbone_cfg"]


def recipe_file(tmp_path, weights=None):
    """The recipe of the golden model."""
    sizes = {name: CFG[name] for name in ("patch_size", "embed_dim", "depth", "num_heads")}
    channels = CASE["settings"]["decode_head_cfg"]["channels"]
    content = {
        "model": {
            "name": "vit_base_patch14_dinov2",
            "weights": weights,
            "img_size": CFG["img_size"],
            "args": sizes,
        },
        "reduce": {"name": "dar"},
        "adapt": {"name": "dar", "dims": CFG["ft_cfg"]["bottleneck"]},
        "decode": {"name": "dar", "channels": channels},
        "data": {"name": "pairs", "root": "nowhere"},
    }
    path = tmp_path / "golden.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def converted(tmp_path, cli, state, recipe, *overrides):
    """The run that the command line makes of a state dict."""
    torch.save(state, tmp_path / "released.pth")
    options = ("--recipe", recipe, "--out", tmp_path / "run")
    code, printed, err = cli("weights", "convert", tmp_path / "released.pth", *overrides, *options)
    assert (code, err) == (0, "")
    assert printed.startswith(f"wrote {tmp_path / 'run'}")
    return Run(tmp_path / "run")


@torch.no_grad()
def test_a_whole_file_gives_the_output_of_the_reference(tmp_path, cli):
    state = reference_model("dar_seg")[2]
    run = converted(tmp_path, cli, state, recipe_file(tmp_path))
    expected = TENSORS["output.eval.logits_mask"]
    torch.testing.assert_close(run.model()(TENSORS["input"]), expected, atol=5e-4, rtol=1e-4)


@torch.no_grad()
def test_a_file_of_trained_weights_only_takes_the_backbone_of_the_recipe(tmp_path, cli):
    save_file(split(TENSORS, "weight.backbone."), tmp_path / "dinov2.safetensors")
    recipe = recipe_file(tmp_path, str(tmp_path / "dinov2.safetensors"))
    state = split(TENSORS, "extra.")
    # Files may lack BatchNorm's count of batches.
    state = {n: value for n, value in state.items() if not n.endswith("num_batches_tracked")}
    run = converted(tmp_path, cli, state, recipe)
    expected = TENSORS["output.eval.logits_mask"]
    torch.testing.assert_close(run.model()(TENSORS["input"]), expected, atol=5e-4, rtol=1e-4)
    Image.new("RGB", (60, 33), "red").save(tmp_path / "image.png")
    code, _, err = cli(
        "predict", run.folder, tmp_path / "image.png", "--out", tmp_path / "masks", "--degree", 9
    )
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "masks" / "image.png") as mask:
        assert mask.size == (60, 33)


def test_a_wrong_or_partial_file_is_one_line_that_lists_what_is_missing(tmp_path, cli):
    state = reference_model("dar_seg")[2]
    del state["decode_head.conv_seg.bias"]
    path = tmp_path / "released.pth"
    torch.save(state, path)
    options = ("--recipe", recipe_file(tmp_path), "--out", tmp_path / "run")
    code, _, err = cli("weights", "convert", path, *options)
    assert code == 2
    assert err.startswith(f"error: {path}: this is not a dar state dict of this model; missing: ")
    assert "decoder.predict.bias" in err
    assert not (tmp_path / "run").exists()
    code, _, err = cli("weights", "convert", tmp_path / "none.pth", *options)
    assert (code, err) == (2, f"error: no such file: {tmp_path / 'none.pth'}.\n")
    code, _, err = cli("weights", "convert", path, "model.weights=x.pth")
    assert (code, err) == (
        2,
        "error: fields of a recipe need --recipe, got model.weights=x.pth.\n",
    )
    code, _, err = cli("weights", "convert", path, *options, "--model", "vit_base_patch14_dinov2")
    assert (code, err) == (2, "error: model and img_size are the recipe's own: leave them out.\n")


def test_a_file_of_the_released_size_becomes_a_run_that_predicts(tmp_path, cli):
    """Every name and shape of the released files, with random values."""
    released = golden("dar_state_dict")[0]
    torch.manual_seed(0)
    shapes = {name: shape for name, shape, _ in released["state_dict"]}
    state = {
        name: 0.02 * torch.randn(shapes[name])
        for name in released["finetune_file_keys"]
        if not name.endswith("num_batches_tracked")
    }
    state = {n: v.abs() if n.endswith("running_var") else v for n, v in state.items()}
    vit = timm.create_model("vit_base_patch14_dinov2", img_size=518, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "dinov2.safetensors")
    weights = f"model.weights={tmp_path / 'dinov2.safetensors'}"
    run = converted(tmp_path, cli, state, "dar/duts", weights)
    (logits,) = run.model()(torch.zeros(1, 3, 518, 518))
    assert logits.shape == (1, 148, 148)
    assert logits.isfinite().all()
