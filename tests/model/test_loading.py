import json

import pytest
import torch
from examples import PAIRS, TINY, images, perturbed, tiny_vit
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file

import tokendial as td

BACKBONE = td.Backbone(name="vit_tiny_patch16_224", args=TINY)


def model(adapt=td.AdaptFormer(dim=4), reduce=td.ToMe(r=4)):  # noqa: B008  # both are immutable
    wrapped = td.wrap(tiny_vit(), reduce=reduce, adapt=adapt, backbone=BACKBONE)
    with torch.no_grad():
        for parameter in wrapped.trainable_parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return wrapped.eval()


@pytest.fixture
def saved(tmp_path):
    model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(("reduce", "adapt"), PAIRS.values(), ids=PAIRS)
@torch.no_grad()
def test_a_loaded_model_has_the_same_logits(tmp_path, reduce, adapt):
    wrapped = model(adapt, reduce)
    wrapped.set_degree(wrapped.degrees[1])
    wrapped.save_pretrained(tmp_path)
    loaded = td.load(tmp_path, vit=tiny_vit())
    assert (loaded.degree, loaded.reduce_config) == (1, reduce)
    assert torch.equal(loaded(images()), wrapped(images()))


def test_only_what_was_trained_is_written(saved):
    tensors = load_file(saved / "model.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"adapter", "vit"}
    assert {name for name in tensors if name.startswith("vit.")} == {
        "vit.head.weight",
        "vit.head.bias",
    }


def test_a_fully_trained_model_needs_no_backbone(tmp_path):
    wrapped = model(td.FullFineTuning())
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path)(images()), wrapped(images()))


def test_a_frozen_backbone_with_random_weights_is_saved_too(tmp_path):
    backbone = td.Backbone(name="vit_tiny_patch16_224", weights=None, args=TINY)
    wrapped = td.wrap(backbone.create().eval(), adapt=td.AdaptFormer(dim=4), backbone=backbone)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path)(images()), wrapped(images()))


def test_a_model_without_methods_is_saved_whole(tmp_path):
    wrapped = td.wrap(tiny_vit(), backbone=BACKBONE)
    wrapped.save_pretrained(tmp_path)
    assert torch.equal(td.load(tmp_path)(images()), wrapped(images()))


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(folder, name, text):
    (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no saved model: config.json"),
        (lambda folder: spoil(folder, "config.json", "{"), "config.json is not valid JSON"),
        (lambda folder: edit(folder, format=2), "format must be 1, got"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "model.safetensors cannot be read",
        ),
        (
            lambda folder: spoil(folder, "model.safetensors", "x"),
            "model.safetensors cannot be read",
        ),
        (lambda folder: edit(folder, adapt={"name": "linear"}), "does not fit this model: 16 "),
    ],
)
def test_a_broken_folder_says_what_is_wrong(saved, break_it, message):
    break_it(saved)
    with pytest.raises(ValueError, match=message):
        td.load(saved, vit=tiny_vit())


@pytest.mark.parametrize("name", ["./nowhere", "nowhere"])
def test_a_folder_that_is_not_there_says_so(name):
    with pytest.raises(ValueError, match="no such folder: nowhere"):
        td.load(name)


def test_another_backbone_of_the_same_shape_is_refused(saved):
    other = perturbed(tiny_vit(), std=0.2)
    with pytest.raises(ValueError, match="trained on another backbone"):
        td.load(saved, vit=other)


def test_a_backbone_of_another_shape_is_refused(saved):
    with pytest.raises(ValueError, match="does not fit this model"):
        td.load(saved, vit=tiny_vit(embed_dim=24))


@torch.no_grad()
def test_another_reduction_than_that_of_training(tmp_path):
    """Degree 0 is the same model for every dial."""
    trained = model(reduce=None)
    trained.save_pretrained(tmp_path)
    reduced = td.load(tmp_path, vit=tiny_vit(), reduce=td.EViT(r=6))
    assert (reduced.degree, reduced.reduce_config) == (6, td.EViT(r=6))
    assert not torch.allclose(reduced(images()), trained(images()), atol=1e-4)
    reduced.set_degree(0)
    torch.testing.assert_close(reduced(images()), trained(images()))


def test_a_reduction_with_weights_cannot_be_had_afterwards(saved):
    with pytest.raises(ValueError, match="does not fit this model"):
        td.load(saved, vit=tiny_vit(), reduce=td.DynamicViT(layers=(2,)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((7,), torch.nan), "vit.head.bias must hold finite numbers, got NaN"),
        (torch.full((7,), -torch.inf), "vit.head.bias must hold finite numbers, got infinity"),
        (torch.ones(7).int(), "vit.head.bias must be of a float type, got torch.int32"),
        (torch.ones(7).bool(), "vit.head.bias must be of a float type, got torch.bool"),
        (torch.ones(7) + 1j, "vit.head.bias must be of a float type, got torch.complex64"),
    ],
)
@pytest.mark.parametrize(
    "again",
    [td.load, lambda folder, vit: td.wrap(vit, reduce=td.ToMe(r=4)).load_adapter("new", folder)],
)
def test_weights_that_are_no_finite_floats_are_refused(saved, again, value, message):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | {"vit.head.bias": value}, saved / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        again(saved, vit=tiny_vit())


def test_an_adapters_file_with_other_tensors_is_refused_and_nothing_is_left_of_it(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | {"adapter.extra": torch.ones(1)}, saved / "model.safetensors")
    wrapped = td.wrap(tiny_vit(), reduce=td.ToMe(r=4))
    with pytest.raises(ValueError, match="1 tensors differ, the first is adapter.extra"):
        wrapped.load_adapter("new", saved)
    assert wrapped.active_adapter == "default"
    wrapped.add_adapter("new", td.BitFit())


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch):
    uploaded = {}

    class Repo:
        repo_id = "me/pets"

    def upload(self, *, repo_id, folder_path):
        from pathlib import Path

        uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}
        return "address"

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: Repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert model().push_to_hub("pets") == "address"
    assert uploaded == {"me/pets": {"config.json", "model.safetensors"}}


def test_a_repository_that_cannot_be_reached_is_one_line(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nmore about it")

    monkeypatch.setattr("tokendial.model.hub.hub_problem", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ValueError, match="me/pets is neither a folder nor on the hub: no network$"):
        td.load("me/pets")


@pytest.mark.parametrize("written", [[], [4, 0], [0, 33], ["0"], [[]], 3, {"0": 1}])
def test_trained_degrees_must_be_those_of_the_dial(saved, written):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"trained_degrees": written}))
    with pytest.raises(ValueError, match=r"trained_degrees must be rising degrees in \[0, 32\]"):
        td.load(saved, vit=tiny_vit())
