"""Masks of classes given by names: files that are written, mean IoU, and the command."""

import csv
import io
import json

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from examples import perturbed
from PIL import Image
from safetensors.torch import save_file
from torchmetrics.segmentation import MeanIoU
from typer.testing import CliRunner
from whole_models import WHOLE

import tokendial as td
from tokendial.cli import app
from tokendial.data.sets.class_mask_layouts import class_mask_pairs
from tokendial.open_vocabulary import class_list
from tokendial.open_vocabulary.loading import load_clip, load_proxy
from tokendial.runs.class_names import evaluate_class_names, predict_class_names

RNG = np.random.default_rng(0)
SIDE = 48
VISION = {"layers": 2, "width": 48, "head_width": 16, "patch_size": 8, "image_size": SIDE}
TEXT = {"width": 16, "heads": 2, "layers": 1, "context_length": 32, "vocab_size": 49408}


THINGS = ["cat", "sofa|couch", "grass", "sky", "tree", "road", "dog", "car", "sea", "bird"]
COARSE = VISION | {"patch_size": 12}


def tiny_clip(vision=VISION):
    torch.manual_seed(0)
    return perturbed(open_clip.CLIP(embed_dim=20, vision_cfg=vision, text_cfg=TEXT), std=0.1)


def small_model(classes, **settings):
    torch.manual_seed(1)
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    proxy = timm.create_model("vit_small_patch8_224.dino", **sizes).eval()
    config = td.ProxyCLIPConfig(
        shortest_side=SIDE, window=SIDE, stride=24, multiple=1, scale=400, **settings
    )
    model = td.ProxyCLIP(tiny_clip(), proxy, config=config).eval()
    model.set_classes(classes, prompts=["a photo of a {}."])
    return model


def photo(path, height=60, width=80):
    # Large pieces of one colour, so that a random model finds several classes.
    small = RNG.integers(0, 255, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST).save(path)


def voc_fixture(root, model, count=3):
    """Photographs in the layout of PASCAL VOC; most pixels of a mask are what the model says."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for number in range(count):
        path = root / "JPEGImages" / f"{number}.jpg"
        photo(path, 60 + 8 * number)
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
        mask = model.predict(pixels)[0].byte().numpy()
        mask[:20], mask[-5:] = RNG.integers(0, 21, (20, mask.shape[1])), 255
        Image.fromarray(mask).save(root / "SegmentationClass" / f"{number}.png")
    names = "\n".join(str(number) for number in range(count))
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text(names)


def test_mean_iou_of_a_voc_fixture(tmp_path):
    """Equals torchmetrics' own class on the predictions.

    Catches: masks or predictions at another size; ignored pixels that count.
    """
    model = small_model(class_list("voc21"), threshold=0.06)
    voc_fixture(tmp_path, model)
    pairs = class_mask_pairs("voc21", str(tmp_path)).val_set()
    seen = []
    found = evaluate_class_names(model, pairs, lambda *done: seen.append(done))
    assert seen == [(n, 3, "degree 0") for n in (1, 2, 3)]

    predicted, masks = [], []
    for image, mask in pairs:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        counted = torch.from_numpy(mask) != 255
        predicted.append(model.predict(pixels)[0][counted])
        masks.append(torch.from_numpy(mask)[counted].long())
    metric = MeanIoU(21, per_class=True, input_format="index")
    metric.update(torch.cat(predicted)[None], torch.cat(masks)[None])
    per_class = metric.compute()
    values = torch.tensor([found[f"iou_{number}"] for number in range(21)])
    torch.testing.assert_close(values, per_class, atol=1e-6, rtol=0)
    assert found["mean_iou"] == pytest.approx(per_class.mean().item(), abs=1e-6)
    assert 0.01 < found["mean_iou"] < 0.99
    assert len(torch.cat(predicted).unique()) > 2


def test_a_mask_and_a_picture_with_a_legend_are_written(tmp_path):
    photo(tmp_path / "a.jpg")
    photo(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no image")
    model = small_model([f"thing {n}" for n in range(6)])
    files = [tmp_path / name for name in ("a.jpg", "b.jpg", "a.png")]
    first, broken, second = predict_class_names(model, files)
    assert "b.jpg" in str(broken)
    assert first.mask == str(tmp_path / "a.mask.png")
    assert second.mask == str(tmp_path / "a-2.mask.png")
    mask = np.asarray(Image.open(first.mask))
    pixels = torch.from_numpy(np.array(Image.open(files[0]))).permute(2, 0, 1)[None] / 255
    np.testing.assert_array_equal(mask, model.predict(pixels)[0].numpy())
    assert list(first.shares.values()) == sorted(first.shares.values(), reverse=True)
    assert sum(first.shares.values()) == pytest.approx(1)
    assert len(first.shares) > 1
    for name, share in first.shares.items():
        assert share == pytest.approx((mask == int(name.split()[1])).mean())
    picture = Image.open(first.picture)
    assert picture.width > 160
    sheet = np.asarray(picture)
    np.testing.assert_array_equal(sheet[:60, :80], np.asarray(Image.open(files[0])))
    # The legend has the colours of the mask beside it.
    colours = {tuple(c) for c in sheet[:60, 87:167].reshape(-1, 3)}
    assert len(colours) == len(first.shares)
    assert (0, 0, 0) not in colours
    assert colours <= {tuple(c) for c in sheet[:, 175:].reshape(-1, 3)}


def saved_bert(folder):
    """A folder with the configuration of a model of transformers that is no ViT."""
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    (folder / "images" / "config.json").write_text(json.dumps(config))
    return str(folder / "images")


def test_models_are_loaded_from_folders_of_transformers(tmp_path):
    """Catches: weights of another model or none; a model in training mode."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = sizes | {"image_size": SIDE, "patch_size": 16, "intermediate_size": 32}
    config = transformers.CLIPConfig(vision_config=vision, text_config=sizes)
    clip = transformers.CLIPModel(config)
    clip.save_pretrained(tmp_path / "clip")
    loaded = load_clip(str(tmp_path / "clip"))
    weight = loaded.visual_projection.weight
    assert torch.equal(weight, clip.visual_projection.weight)
    assert not loaded.training

    dino = transformers.Dinov2Model(transformers.Dinov2Config(**vision))
    dino.save_pretrained(tmp_path / "dino")
    proxy = load_proxy(str(tmp_path / "dino"))
    assert torch.equal(proxy.layernorm.weight, dino.layernorm.weight)
    assert td.wrap(proxy).feature_map(torch.zeros(1, 3, 64, 64)).shape == (1, 24, 4, 4)
    with pytest.raises(ValueError, match="proxy weights must be left out"):
        load_proxy(str(tmp_path / "dino"), "file.safetensors")

    sam = WHOLE["SAM"].build()
    sam.save_pretrained(tmp_path / "sam")
    proxy = load_proxy(str(tmp_path / "sam"))
    found = proxy.vision_encoder.patch_embed.projection.weight
    assert torch.equal(found, sam.vision_encoder.patch_embed.projection.weight)
    assert not proxy.training


@pytest.fixture
def folders(tmp_path):
    """A CLIP model in a folder of open_clip, and the weights of a proxy in a file."""
    clip = tmp_path / "clip"
    clip.mkdir()
    config = {"model_cfg": {"embed_dim": 20, "vision_cfg": COARSE, "text_cfg": TEXT}}
    (clip / "open_clip_config.json").write_text(json.dumps(config | {"preprocess_cfg": {}}))
    save_file(tiny_clip(COARSE).state_dict(), clip / "open_clip_model.safetensors")
    torch.manual_seed(1)
    proxy = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(proxy.state_dict(), tmp_path / "proxy.safetensors")
    (tmp_path / "images").mkdir()
    photo(tmp_path / "images" / "a.jpg")
    return tmp_path


def command_model(folders, reduce, proxy_reduce):
    """The model that the commands load."""
    proxy = load_proxy("vit_tiny_patch16_224", str(folders / "proxy.safetensors"))
    clip = load_clip(str(folders / "clip"))
    return td.ProxyCLIP(clip, proxy, reduce=reduce, proxy_reduce=proxy_reduce)


def test_the_command_writes_masks(folders, monkeypatch):
    ran_at, predict = [], td.ProxyCLIP.predict

    def recorded(model, images):
        ran_at.append((model.degree, model.proxy_degree))
        return predict(model, images)

    monkeypatch.setattr(td.ProxyCLIP, "predict", recorded)
    arguments = ["segment", str(folders / "images"), "--classes", ",".join(THINGS)]
    arguments += ["--clip", str(folders / "clip"), "--proxy", "vit_tiny_patch16_224"]
    arguments += ["--proxy-weights", str(folders / "proxy.safetensors")]
    arguments += ["--degree", "8", "--proxy-degree", "36"]
    for _ in range(2):  # the files of the first run are no images of the second
        done = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert done.exit_code == 0
        rows = list(csv.DictReader(io.StringIO(done.stdout)))
        assert {row["class"] for row in rows} <= {name.split("|")[0] for name in THINGS}
        assert sum(float(row["share"]) for row in rows) == pytest.approx(1, abs=1e-3)
        assert {row["path"] for row in rows} == {str(folders / "images" / "a.jpg")}
    mask = torch.from_numpy(np.array(Image.open(rows[0]["mask"])))
    model = command_model(folders, td.ToMe(r=8), td.ToMe(r=36))
    model.set_classes([name.split("|") for name in THINGS])
    pixels = np.array(Image.open(folders / "images" / "a.jpg"))
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert torch.equal(mask, model.predict(batch)[0])
    assert set(ran_at) == {(8, 36)}
    (folders / "images" / "b.jpg").write_text("no image")
    done = CliRunner().invoke(app, [*arguments, "--out", str(folders / "new")])
    assert done.exit_code == 1
    assert sorted(p.name for p in (folders / "new").iterdir()) == ["a.classes.png", "a.mask.png"]


def test_the_command_measures_mean_iou_at_each_degree(folders):
    """The rows are those of the library on the same models."""
    root = folders / "voc"
    voc_fixture(root, small_model(class_list("voc21")), count=1)
    models = ["--clip", str(folders / "clip"), "--proxy", "vit_tiny_patch16_224"]
    models += ["--proxy-weights", str(folders / "proxy.safetensors")]
    arguments = ["segment-eval", "voc21", str(root), *models]
    done = CliRunner().invoke(app, [*arguments, "--degrees", "0,8"], catch_exceptions=False)
    assert done.exit_code == 0
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["degree"] for row in rows] == ["0", "8"]
    model = command_model(folders, td.ToMe(r=8), None)
    model.set_classes(class_list("voc21"))
    pairs = class_mask_pairs("voc21", str(root)).val_set()
    assert float(rows[1]["mean_iou"]) == pytest.approx(
        evaluate_class_names(model, pairs)["mean_iou"], abs=1e-4
    )
    assert float(rows[1]["gmacs"]) == pytest.approx(model.cost().gmacs, rel=1e-3)
    assert rows[1]["gmacs"] != rows[0]["gmacs"]
    (folders / "names.txt").write_text("cat\ndog\n")
    wrong = CliRunner().invoke(app, [*arguments, "--classes", str(folders / "names.txt")])
    assert "classes must be 21 for voc21, got 2" in str(wrong.exception)


def test_the_commands_take_a_fine_tuned_tower(folders):
    clip = load_clip(str(folders / "clip"))
    tower = td.wrap(clip.visual, reduce=td.ToMe(r=4), adapt=td.DenseAdapter(dim=4)).eval()
    perturbed(tower.adapter, std=0.3)
    tower.save_pretrained(folders / "tower")
    arguments = ["segment", str(folders / "images"), "--classes", ",".join(THINGS)]
    arguments += ["--clip", str(folders / "clip"), "--proxy", "vit_tiny_patch16_224"]
    arguments += ["--proxy-weights", str(folders / "proxy.safetensors")]

    def mask(*options):
        done = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
        assert done.exit_code == 0
        return torch.from_numpy(np.array(Image.open(folders / "images" / "a.mask.png")))

    def expected(degree):
        proxy = load_proxy("vit_tiny_patch16_224", str(folders / "proxy.safetensors"))
        model = td.ProxyCLIP(clip, proxy, clip_tower=tower)
        model.set_degree(degree)
        model.set_classes([name.split("|") for name in THINGS])
        pixels = np.array(Image.open(folders / "images" / "a.jpg"))
        return model.predict(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)[0]

    tuned = mask("--clip-tower", str(folders / "tower"))
    assert torch.equal(tuned, expected(4))  # the degree that it was saved at
    assert not torch.equal(tuned, mask())
    whole = mask("--clip-tower", str(folders / "tower"), "--degree", "0")
    assert torch.equal(whole, expected(0))
    wrong = CliRunner().invoke(app, [*arguments, "--clip-tower", str(folders / "images")])
    assert "clip_tower: " in str(wrong.exception)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (
            lambda f: load_clip("ViT-B-61", "openai"),
            "neither a folder.* did you mean ViT-B-16",
        ),
        (
            lambda f: load_clip("ViT-B-16", "openais"),
            "one of openai, .*, got 'openais'",
        ),
        (lambda f: load_clip("ViT-B-16"), "clip weights must be given for 'ViT-B-16'"),
        (lambda f: load_clip(str(f / "clip"), "openai"), "clip weights must be left out"),
        (lambda f: load_clip(str(f / "images")), "there is no config.json in it"),
        (lambda f: load_clip("ViT-B-16", str(f / "proxy.safetensors")), "clip 'ViT-B-16': "),
        (lambda f: load_proxy("vit_tinny_patch16_224"), "is not a timm model; did you mean"),
        (
            lambda f: load_proxy("samvit_base_patch16", "no.pt"),
            "pretrained or a weight file, got 'no.pt'",
        ),
        (lambda f: load_proxy(str(f / "images")), "there is no config.json in it"),
        (lambda f: load_proxy(saved_bert(f)), "'transformers.BertModel' is not a class"),
        (lambda f: load_clip(saved_bert(f)), "a folder of a CLIP model, .* holds another one"),
    ],
)
def test_models_that_cannot_be_loaded_are_one_line(folders, load, message):
    with pytest.raises(ValueError, match=message) as raised:
        load(folders)
    assert "\n" not in str(raised.value)
