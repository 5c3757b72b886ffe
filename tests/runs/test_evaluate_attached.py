"""`tokendial attach`: models in folders of transformers and open_clip, beside degree 0."""

import csv
import json

import numpy as np
import pytest
import torch
import transformers
from examples import perturbed
from model_folders import SQUARE, save_quietly, write_open_clip_folder, write_transformers_folder
from PIL import Image
from safetensors.torch import save_file
from whole_models import TEXT, VISION

import tokendial as td
from tokendial.measure.agreement import depth_agreement
from tokendial.model.tower_dial import DialedPart
from tokendial.runs.evaluate_attached import evaluate_attached
from tokendial.runs.image_model import open_image_model


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    """Spend no second on the speed of each degree."""
    monkeypatch.setattr("tokendial.runs.evaluate_attached._TIMING_SECONDS", 0.0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five images of noise: the third is upright, the others lie."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(5):
        size = (96, 72, 3) if number == 2 else (72, 96, 3)
        coarse = random.integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes the folder of a small model of transformers, and of its image processor."""

    def save(name):
        return write_transformers_folder(name, tmp_path_factory.mktemp(name.replace(" ", "_")))

    return save


def inputs_of(folder, photos):
    """The input of each image by the processor in the folder."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    files = sorted(photos.glob("*.png"))
    return [processor(Image.open(file), return_tensors="pt")["pixel_values"] for file in files]


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@torch.no_grad()
def test_embeddings_beside_a_computation_by_hand(cli, folder_of, photos, tmp_path):
    folder, out = folder_of("DINOv2 features"), tmp_path / "out"
    code, printed, err = cli(
        "attach", folder, "--images", photos, "--reduce", "tome", "--degrees", "0..8:4",
        "--batch-size", 2, "--out", out, "reduce.inflection=1",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "Dinov2Model: tome in model (Dinov2Model)" in printed
    assert "pooler_output and last_hidden_state of Dinov2Model(pixel_values)" in printed
    assert "images: 5; cost and speed of Dinov2Model(pixel_values) on 2 x 3 x 64 x 64" in printed
    assert "same neighbours" in printed
    assert (out / "attached.png").stat().st_size > 1000
    rows = read_csv(out / "attached.csv")
    assert [row["degree"] for row in rows] == ["0", "4", "8"]

    model = transformers.Dinov2Model.from_pretrained(folder)
    images = torch.cat(inputs_of(folder, photos))
    first = model(images)
    with td.attach(model, td.ToMe(inflection=1)) as dial:
        for row in rows:
            dial.set_degree(int(row["degree"]))
            found = model(images)
            pairs = list(zip(found.pooler_output, first.pooler_output, strict=True))
            cosine = np.mean([float(a @ b / (a.norm() * b.norm())) for a, b in pairs])
            assert float(row["cosine"]) == pytest.approx(cosine, abs=1e-5)
            tokens = torch.cosine_similarity(found[0], first[0], dim=2).mean()
            assert float(row["feature_cosine"]) == pytest.approx(float(tokens), abs=1e-5)
            same = [near(found.pooler_output, i) & near(first.pooler_output, i) for i in range(5)]
            shared = np.mean([len(each) / 2 for each in same])
            assert float(row["same_neighbours"]) == pytest.approx(shared, abs=1e-5)
            assert float(row["tower_gmacs"]) == pytest.approx(dial.cost().gmacs, rel=1e-4)
            assert float(row["gmacs"]) == pytest.approx(
                dial.cost_of_call(images[:2]) / 2e9, rel=1e-4
            )
    assert float(rows[2]["feature_cosine"]) < 0.95
    assert float(rows[2]["gmacs"]) < 0.95 * float(rows[0]["gmacs"])


def near(embeddings, index):
    """The two other images that are most like one."""
    like = torch.cosine_similarity(embeddings, embeddings[index : index + 1])
    like[index] = -2
    return set(like.topk(2).indices.tolist())


@torch.no_grad()
def test_depths_of_images_of_two_sizes_beside_a_computation_by_hand(folder_of, photos):
    folder = folder_of("Depth Anything")
    source, files = open_image_model(folder), sorted(photos.glob("*.png"))
    found = evaluate_attached(source, files, td.ToMe(), "0,4", batch_size=4)
    assert found.towers == ("backbone (Dinov2Backbone)",)
    assert found.timed_shape == (3, 3, 64, 88)  # of the first four, three have this size
    images = inputs_of(folder, photos)
    assert {tuple(image.shape[2:]) for image in images} == {(64, 88), (88, 64)}
    model = transformers.DepthAnythingForDepthEstimation.from_pretrained(folder)
    first = [model(image).predicted_depth for image in images]
    errors = []
    with td.attach(model, td.ToMe()) as dial:
        dial.set_degree(4)
        for image, depth in zip(images, first, strict=True):
            difference = model(image).predicted_depth - depth
            errors.append(float(difference.abs().sum() / depth.abs().sum()))
    row = found.rows[1]
    assert row.scores == {"relative_error": pytest.approx(np.mean(errors), rel=1e-3)}
    assert row.accuracy == 1 - row.scores["relative_error"] < 1
    assert found.rows[0].scores == {"relative_error": 0}
    # The neck and the head are no part of the tower, and stay.
    rest = [row.gmacs - row.tower_gmacs for row in found.rows]
    assert rest[0] == pytest.approx(rest[1])
    assert rest[0] > found.rows[0].tower_gmacs > row.tower_gmacs


@torch.no_grad()
def test_padding_of_images_of_many_shapes_is_not_compared(photos, tmp_path):
    torch.manual_seed(0)
    vision = {name: value for name, value in VISION.items() if name != "image_size"}
    config = transformers.Siglip2Config(
        vision_config=vision | {"num_patches": 64}, text_config=TEXT | {"projection_size": 48}
    )
    model = perturbed(transformers.Siglip2Model(config)).eval()
    model.save_pretrained(tmp_path)
    processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=64)
    processor.save_pretrained(tmp_path)
    files = sorted(photos.glob("*.png"))
    found = evaluate_attached(open_image_model(tmp_path), files, td.ToMe(), "8")
    assert found.timed_shape == (5, 64, 192)  # both shapes in one call
    inputs = processor([Image.open(file) for file in files], return_tensors="pt")
    real = inputs["pixel_attention_mask"].bool()
    assert not real.all()
    first = model.get_image_features(**inputs).last_hidden_state
    with td.attach(model, td.ToMe(r=8)):
        features = model.get_image_features(**inputs).last_hidden_state
    cosine = torch.cosine_similarity(features, first, dim=2)
    means = [float(each[own].mean()) for each, own in zip(cosine, real, strict=True)]
    assert found.rows[0].scores["feature_cosine"] == pytest.approx(np.mean(means), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "reduce", "compared", "scores"),
    [
        ("CLIP", td.ToMe(), ("pooler_output", "last_hidden_state"),
         ["same_neighbours", "cosine", "feature_cosine"]),
        ("DINOv2 classifier", td.EViT(r=0), ("logits",), ["same_answer", "probability_overlap"]),
        ("DINOv2 feature maps", td.ToMe(), ("feature_maps",), ["feature_cosine"]),
        ("UperNet", td.ToMe(), ("logits",), ["same_pixels", "mean_iou"]),
        ("ViTPose", td.ToMe(), ("heatmaps",), ["overlap", "same_peak"]),
        ("YOLOS", td.ToMe(), ("pred_boxes and logits",), ["boxes_found_again"]),
        ("LLaVA", td.ToMe(), ("pooler_output",), ["feature_cosine"]),
        ("SAM", td.FFNMerge(), ("image_embeddings",), ["feature_cosine"]),
    ],
)  # fmt: skip
def test_what_is_compared_follows_from_what_the_model_gives(
    folder_of, photos, name, reduce, compared, scores
):
    source = open_image_model(folder_of(name))
    found = evaluate_attached(source, sorted(photos.glob("*.png")), reduce, "0,8")
    assert found.compared == compared
    at_0, at_8 = found.rows
    assert list(at_8.scores) == scores
    assert at_0.scores == dict.fromkeys(scores, pytest.approx(1, abs=1e-5))
    assert all(0 <= score <= 1 + 1e-5 for score in at_8.scores.values())
    assert at_8.tower_gmacs < at_0.tower_gmacs <= at_0.gmacs
    assert not any(isinstance(module, DialedPart) for module in source.model.modules())


def test_a_folder_of_open_clip(cli, photos, tmp_path):
    write_open_clip_folder(tmp_path)
    code, printed, _ = cli(
        "attach", tmp_path, "--images", photos, "--degrees", "0,8", "--tower", "visual"
    )
    assert code == 0
    assert "tome in visual (VisionTransformer)" in printed
    assert "compared with degree 0: encode_image of encode_image(image)" in printed
    assert "wrote" not in printed


def test_half_precision(folder_of, photos):
    source = open_image_model(folder_of("DINOv2 feature maps"))
    found = evaluate_attached(
        source, sorted(photos.glob("*.png")), td.ToMe(), "8", precision="bf16"
    )
    assert next(source.model.parameters()).dtype == torch.bfloat16
    assert 0.5 < found.rows[0].scores["feature_cosine"] < 0.99


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DINOv2 features", ["--degrees", "0,99"], "degrees must lie in [0, "),
        ("DINOv2 features", ["--reduce", "none"], "reduce.name must be one of"),
        ("DINOv2 features", ["--reduce", "dyt"], "reduce must be a method without weights"),
        ("DINOv2 features", ["reduce.r=-1"], "r must be an integer of at least 0"),
        ("DINOv2 features", ["adapt.dim=8"], "adapt: attach takes settings of reduce only"),
        ("DINOv2 features", ["--tower", "text"], "towers must be names of ViTs in the model: ''"),
        ("I-JEPA features", ["--reduce", "evit"], "EViT"),
        ("MAE features", [], "ViTMAEModel cannot be compared with itself: last_hidden_state"),
        ("OWLv2", [], "{folder}: Owlv2ForObjectDetection cannot be compared by images alone"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line_and_code_2(
    cli, folder_of, photos, name, arguments, message
):
    folder = folder_of(name)
    code, _, err = cli("attach", folder, "--images", photos, *arguments)
    assert code == 2
    assert err.startswith(f"error: {message.format(folder=folder)}"), err
    assert len(err.splitlines()) == 1


def test_folders_without_a_usable_model_are_one_line_and_code_2(cli, folder_of, photos, tmp_path):
    def refused(folder, images=photos):
        code, _, err = cli("attach", folder, "--images", images)
        assert (code, len(err.splitlines())) == (2, 1), err
        return err.removeprefix("error: ").strip()

    assert refused(tmp_path / "none").startswith("model must be a local folder, ")
    assert "holds no model: there is neither config.json" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    assert "is of no model of transformers: no model_type" in refused(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["Unheard"]}')
    assert "architectures names Unheard, which this version of" in refused(tmp_path)
    folder = folder_of("DINOv2 features")
    assert refused(folder, tmp_path / "no.jpg").startswith("no such image or folder")
    (tmp_path / "no.jpg").write_text("no image")
    assert "no.jpg is not an image" in refused(folder, tmp_path / "no.jpg")
    assert "images must be at least 3, because nearest neighbours" in refused(
        folder, photos / "0.png"
    )
    (folder / "preprocessor_config.json").unlink()
    assert "says not how images are prepared" in refused(folder)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    assert "tensors of Dinov2Model are missing in its weights, the first is embed" in refused(
        folder
    )


def test_a_model_without_a_vit_is_one_line_and_code_2(cli, photos, tmp_path):
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_channels=3
    )
    save_quietly(transformers.ResNetModel(config), tmp_path)
    transformers.ViTImageProcessor(size=SQUARE).save_pretrained(tmp_path)
    code, _, err = cli("attach", tmp_path, "--images", photos)
    assert (code, len(err.splitlines())) == (2, 1)
    assert err.startswith("error: model (ResNetModel) holds no ViT that is supported")


def test_a_folder_that_names_no_class_is_opened_by_its_type(folder_of):
    folder = folder_of("DINOv2 features")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert open_image_model(folder).name == "Dinov2Model"


def test_depth_that_is_equal_has_no_error():
    depth = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
    assert depth_agreement(depth, depth)["relative_error"].tolist() == [0, 0]
