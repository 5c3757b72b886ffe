import dataclasses
import json
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml

import tokendial as td
from tokendial.data import ImageFolder
from tokendial.methods import to_json
from tokendial.runs import CompensateRecipe, Recipe, read_recipe
from tokendial.runs.new_model import build_model
from tokendial.runs.recipe import check_recipe
from tokendial.runs.recipe_file import explicit_fields
from tokendial.runs.run import dotted_fields

MINIMAL = {
    "output": "out",
    "model": {"name": "deit_small_patch16_224"},
    "adapt": {"name": "linear"},
    "data": {"name": "image_folder", "root": "pets"},
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "pets.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | {"reduce": {"name": "evit", "layers": [4, 7]}}))
    return path


def test_methods_are_values(file):
    recipe = read_recipe(file)
    assert recipe.reduce == td.EViT(layers=(4, 7))
    assert recipe.adapt == td.LinearProbe()
    assert recipe.data == ImageFolder(root="pets")


@pytest.mark.parametrize("name", ["tome", "evit"])
@pytest.mark.parametrize("r", [8, [8, 4], [[8, 4], [16]]])
def test_lists_of_r_are_read_and_written(file, name, r):
    recipe = read_recipe(file, [f"reduce={{name: {name}, r: {r}}}"])
    assert recipe.reduce == type(recipe.reduce)(r=r)
    assert to_json("reduce", recipe.reduce)["r"] == r
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    schema = Recipe.model_json_schema()
    jsonschema.validate(recipe.model_dump(mode="json"), schema)


def test_a_list_of_degrees_is_short_for_each(file):
    recipe = read_recipe(file, ["train.degrees=[0, 4, 8]"])
    assert recipe == read_recipe(file, ["train.degrees={each: [0, 4, 8]}"])
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_overrides_reach_every_depth(file):
    recipe = read_recipe(
        file, ["train.epochs=3", "train.lr=1e-4", "reduce.keep_rate=0.5", "model.img_size=[96, 64]"]
    )
    assert (recipe.train.epochs, recipe.train.lr) == (3, 1e-4)
    assert recipe.reduce.keep_rate == 0.5
    assert recipe.model.img_size == (96, 64)


def test_the_run_is_named_after_the_recipe(tmp_path):
    path = tmp_path / "cats.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "output"}))
    assert read_recipe(path).output == "runs/cats"


def test_a_schedule_of_tome_is_written_with_its_inflection(file):
    recipe = read_recipe(file, ["reduce={name: tome, r: 8, inflection: -1.0}"])
    assert recipe.reduce == td.ToMe(r=(8, -1.0))


def test_what_is_written_reads_back_the_same(file):
    recipe = read_recipe(file, ["augment.mixup=0.8", "adapt={name: lora, rank: 4}"])
    assert check_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "pretrain_scenes", "pretrain_items"])
def test_shipped_recipes_are_found_by_name(name):
    assert read_recipe(name).model.name == "scenes_vit"


SHIPPED = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize(
    "name", [str(file.relative_to(SHIPPED).with_suffix("")) for file in SHIPPED.rglob("*.yaml")]
)
def test_every_shipped_recipe_reads_and_names_its_runs(name):
    kind = CompensateRecipe if "compensate" in explicit_fields(name) else Recipe
    recipe = read_recipe(name, ["data.root=images"] if name == "image_folder" else [], kind=kind)
    assert recipe.output == f"runs/{name}"


def test_recipes_of_dar_train_what_was_published():
    recipe = read_recipe("dar_star/cod", ["model.weights=null"])
    with torch.device("meta"):
        model = build_model(recipe, 1)
    assert model.cost().trainable_params == 12 * 195_722
    # With the decoder of the authors' code, 2,612,089 parameters are trained in all.
    assert sum(p.numel() for p in model.trainable_parameters()) == 2_612_089


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "train.epoch is not a field of a recipe; did you mean train.epochs[?]$"),
        ("epochs=3", r"^epochs is not a field of a recipe; did you mean train.epochs\?$"),
        ("reduce.epochs=3", r"^reduce.epochs is not a field of evit; it has reduce.keep_rate, .*"),
        ("adapt.dim=3", "^adapt.dim is not a field of linear; it has no fields.$"),
        ("zzz=3", "zzz is not a field of a recipe.$"),
        ("train.epochs=many", "train.epochs: Input should be a valid integer.*, got 'many'"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1, got 0"),
        ("train.lr=-1", "train.lr: Input should be greater than 0, got -1"),
        ("train.lr=.inf", "train.lr: Input should be a finite number, got inf"),
        (
            "train.warmup_epochs=101",
            r"train: warmup_epochs must be at most epochs \(100\), got 101",
        ),
        ("metrics=[]", "metrics: .*at least 1 item"),
        ("metrics=[recall]", "metrics.0: .*'accuracy_top5', 'balanced_accuracy', .*'recall'"),
        ("metrics=[f1,f1]", r"metrics must name each metric once, got \['f1', 'f1'\]"),
        ("train.class_weights=[1,0]", r"train.class_weights: must be .* above 0, got \[1, 0\]"),
        ("train.class_weights=even", "train.class_weights: must be balanced or .*, got 'even'"),
        ("train.min_lr=1", r"train: min_lr must be at most lr \(0.001\), got 1"),
        ("model.args.num_classes=3", "model.args.num_classes cannot be set"),
        ("train.precision=fp8", "train.precision: Input should be 'fp32', 'bf16' or 'fp16'"),
        ("model.name=transformers.ViTModel", "model: name must be a timm model, got 'transf"),
        ("augment.flip=2", r"augment: flip must lie in \[0, 1\], got 2"),
        (
            "augment.flop=2",
            "augment.flop is not a field of a recipe; did you mean augment.flip[?]$",
        ),
        ("reduce.name=none", r"reduce: reduce.name must be one of dar, .*, tome, got 'none'"),
        ("reduce.keep_rate=0", r"reduce: keep_rate must be in \(0, 1\], got 0"),
        ("reduce.layers=[1.5]", "reduce.layers.0: Input should be a valid integer"),
        (
            "reduce.keep_rates=0.5",
            r"reduce.keep_rates is not a field of evit; did you mean reduce.keep_rate\?$",
        ),
        (
            "adapt=8",
            "adapt: must be a mapping with a name, one of adaptformer, bitfit, combined, convpass",
        ),
        ("data.root=null", "data.root: Input should be a valid string, got None"),
        ("train.lr", "an override must look like train.epochs=10, got 'train.lr'"),
        ("seed.x=1", "seed.x: seed is not a mapping"),
        ("train.lr=[", r"train.lr: '\[' is not a YAML value"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_field(file, override, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(file, ["seed=0", override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "reduce"),
    [
        (["reduce.name=tome"], td.ToMe()),
        (["reduce.name=evit"], td.EViT(layers=(4, 7))),
        (["reduce.name=tome", "reduce.r=3"], td.ToMe(r=3)),
        (["reduce.r=3", "reduce.name=tome"], td.ToMe(r=3)),
        (["reduce.keep_rate=0.5", "reduce.name=evit"], td.EViT(layers=(4, 7), keep_rate=0.5)),
    ],
)
def test_another_method_drops_the_settings_of_the_one_before(file, overrides, reduce):
    assert read_recipe(file, overrides).reduce == reduce


@pytest.mark.parametrize("mix", ["augment.mixup=0.5", "augment.cutmix=1"])
def test_mixing_needs_pairs(file, mix):
    with pytest.raises(ValueError, match=r"^train.batch_size must be even for .*, got 33\.$"):
        read_recipe(file, [mix, "train.batch_size=33"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just text", "must be a mapping of fields, got str"),
        ("a: [", "cannot be read"),
        ("output: x", "model is missing from the recipe"),
    ],
)
def test_a_file_that_is_no_recipe_says_so(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_recipe(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)


def test_a_missing_recipe_says_so():
    with pytest.raises(ValueError, match=r"no such recipe: nowhere\.yaml"):
        read_recipe("nowhere.yaml")


def chain(tmp_path, **files):
    """Recipe files by name, each a mapping."""
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / f"{next(iter(files))}.yaml"


def test_a_recipe_holds_only_what_differs_from_its_base(tmp_path):
    path = chain(
        tmp_path,
        top={"base": "middle", "train": {"epochs": 7}, "reduce": {"keep_rate": 0.5}},
        middle={"base": "demo", "train": {"lr": 0.5}, "adapt": {"dim": 4}},
    )
    recipe, base = read_recipe(path), read_recipe("demo")
    assert recipe.train == base.train.model_copy(update={"epochs": 7, "lr": 0.5})
    assert recipe.adapt == td.DenseAdapter(dim=4)
    assert recipe.reduce == dataclasses.replace(base.reduce, keep_rate=0.5)
    assert recipe.output == "runs/top"
    replaced = chain(tmp_path, other={"base": "demo", "reduce": {"name": "tome"}})
    assert read_recipe(replaced).reduce == td.ToMe()
    assert read_recipe(replaced, ["reduce.r=2"]).reduce == td.ToMe(r=2)
    without = chain(tmp_path, without={"base": "demo", "reduce": None})
    assert read_recipe(without).reduce is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": {"base": "b"}, "b": {"base": "a"}}, "a.yaml: base leads back to itself"),
        ({"a": {"base": "nothing"}}, "a.yaml: base: no such recipe: nothing"),
        ({"a": {"base": 3}}, "a.yaml: base must be the name of a recipe, got 3"),
    ],
)
def test_a_base_that_cannot_be_read_is_one_line(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(chain(tmp_path, **files))


def test_recipes_are_listed_and_described(cli):
    code, printed, _ = cli("recipes")
    assert code == 0
    listed = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert listed["demo"].startswith("Sparse-Tuning of the shipped small model: EViT")
    assert listed["baselines/"].startswith("What Sparse-Tuning is compared with")
    assert "dar/duts" not in printed
    for folder in ("baselines", "baselines/vtab/"):
        code, printed, _ = cli("recipes", folder)
        assert code == 0
        names = [line.split()[0] for line in printed.splitlines()]
        assert "baselines/vtab/lora" in names
        assert ("baselines/cifar100/lora" in names) == (folder == "baselines")
    code, printed, _ = cli("recipes", "dar_star/cod")
    assert code == 0
    assert printed.startswith("# DAR* on camouflage")
    fields = yaml.safe_load(printed)
    assert fields["data"]["root"] == ["datasets/cod10k", "datasets/camo"]
    assert fields["distill"] == {"weight": 0.1, "dim": None, "detach": False}
    assert cli("recipes", "none")[::2] == (2, "error: no such recipe: none.\n")


def test_a_printed_recipe_says_which_recipe_sets_a_field(cli):
    printed = cli("recipes", "dyt/vtab_r07")[1]
    lines = {line.strip() for line in printed.splitlines()}
    assert "target_ratio: 0.7  # dyt/vtab_r07" in lines
    assert "lr: 0.001  # dyt/vtab" in lines
    assert "min_lr: 0.0" in lines  # a default
    # Another method drops what the base says of its own.
    printed = cli("recipes", "baselines/vtab/convpass")[1]
    assert "  scale: 1.0\n  dropout: 0.1  # baselines/vtab/convpass\n" in printed
    assert "reduce: null  # baselines/vtab/convpass" in printed


@pytest.mark.parametrize(
    ("name", "open_field", "kind"),
    [
        ("demo", [], Recipe),
        ("dar_star/cod", [], Recipe),
        ("image_folder", ["data.root=pets"], Recipe),
        ("tocom_scenes", [], CompensateRecipe),
    ],
)
def test_a_printed_recipe_has_every_field_and_is_the_same_recipe(
    cli, tmp_path, name, open_field, kind
):
    code, printed, _ = cli("recipes", name)
    assert code == 0
    explained = tmp_path / "explained.yaml"
    explained.write_text(printed)
    recipe = read_recipe(name, open_field, kind=kind)
    assert read_recipe(explained, open_field, kind=kind) == recipe
    fields, expected = (
        dotted_fields(fields) for fields in (yaml.safe_load(printed), recipe.model_dump())
    )
    named = {text.partition("=")[0] for text in open_field}
    assert fields.keys() | named >= expected.keys()
    assert all(f"# {field} is required; this recipe does not set it." in printed for field in named)


def test_the_schema_accepts_every_shipped_recipe_and_no_mistake(cli):
    schema = jsonschema.Draft202012Validator(json.loads(cli("recipes", "--schema")[1]))
    for file in SHIPPED.rglob("*.yaml"):
        schema.validate(yaml.safe_load(file.read_text()))
    schema.validate({"train": {"degrees": [0, 4, 8]}})
    for wrong in (
        {"trian": {}},
        {"train": {"lr": "fast"}},
        {"train": {"degrees": [0, "low"]}},
        {"reduce": {"name": "tomé"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            schema.validate(wrong)


def test_the_schema_describes_every_field_of_sections_and_methods(cli):
    schema = json.loads(cli("recipes", "--schema")[1])
    sections = dict(schema["$defs"])
    for kind in ("reduce", "adapt", "decode", "data"):
        for method in schema["anyOf"][0]["properties"][kind]["anyOf"]:
            if "properties" in method:
                sections[method["properties"].pop("name")["const"]] = method
    undescribed = {
        f"{section}.{field}"
        for section, part in sections.items()
        for field, value in part.get("properties", {}).items()
        if not value.get("description")
    }
    assert not undescribed
