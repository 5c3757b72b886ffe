"""The server over HTTP: its answers equal the offline model's, and all errors have one form."""

import io
import zlib
from base64 import b64decode
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from PIL import Image
from served_runs import write_run
from serving import file, form, picture, serving, text

from tokendial.runs.predict import predict
from tokendial.serve.workers.catalog import ModelCatalog

PNG, JSON, FORM = "image/png", "application/json", "multipart/form-data; boundary=x"


@pytest.fixture(scope="module")
def server(pets, cars):
    with serving({"pets": pets, "cars": cars}, max_images=4, max_bytes=100_000) as running:
        yield running


@torch.no_grad()
def offline(run, image: Image.Image, degree: int) -> dict[str, float]:
    model = run.model()
    model.set_degree(degree)
    seen = run.task().image_transform(model.anatomy)(image).unsqueeze(0)
    probabilities = model(seen)[0].softmax(0)
    return dict(zip(run.classes(), probabilities.tolist(), strict=True))


def probabilities(prediction: dict) -> dict[str, float]:
    return {found["name"]: found["probability"] for found in prediction["classes"]}


def test_a_raw_image_gets_the_answer_of_the_offline_model(server, pets):
    reply = server.ask("/v1/predict", file(picture()), PNG)
    assert reply.status == 200, reply.body
    (prediction,) = reply.json["predictions"]
    assert probabilities(prediction) == pytest.approx(
        offline(pets, picture(), prediction["degree"])
    )
    values = list(probabilities(prediction).values())
    assert values == sorted(values, reverse=True)
    assert reply.json["model"] == "pets"
    assert prediction["batch"] == 1
    assert prediction["compute_ms"] > 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_every_format_is_read(server, kind):
    assert server.ask("/v1/predict", file(picture(), kind), f"image/{kind.lower()}").status == 200


def test_images_of_twelve_bits_are_read_with_the_range_of_the_run(tmp_path):
    """By the server and by predict, as the same image of 8 bits is."""
    run = write_run(tmp_path / "run", ["cat", "dog"], value_range=[0, 4080])
    plain = np.asarray(picture().convert("L"))
    deep = file(Image.fromarray(plain.astype(np.uint16) * 16))
    (tmp_path / "deep.png").write_bytes(deep)
    (answer,) = predict(run, [tmp_path / "deep.png"], degree=0, top=2)
    expected = offline(run, Image.fromarray(plain).convert("RGB"), 0)
    assert dict(zip(answer.classes, answer.probabilities, strict=True)) == pytest.approx(expected)
    with serving({"run": run}) as server:
        reply = server.ask("/v1/predict?degree=0", deep, PNG)
    assert probabilities(reply.json["predictions"][0]) == pytest.approx(expected)


@pytest.mark.parametrize("degree", [0, 3])
@pytest.mark.parametrize("send", [form, text])
def test_several_images_are_answered_in_their_order(server, cars, send, degree):
    images = [picture(seed, (20 + seed, 30)) for seed in range(3)]
    files = [file(image) for image in images]
    if send is form:
        reply = server.ask(f"/v1/predict?model=cars&degree={degree}", *form(*files))
    else:
        reply = server.ask("/v1/predict", *text(*files, model="cars", degree=degree))
    assert reply.status == 200, reply.body
    for prediction, image in zip(reply.json["predictions"], images, strict=True):
        assert prediction["degree"] == degree
        assert probabilities(prediction) == pytest.approx(offline(cars, image, degree), abs=1e-5)


def test_a_mask_has_the_size_of_its_image(masks):
    with serving({"masks": masks}, degree=3) as server:
        reply = server.predict(file(picture(size=(50, 40))), file(picture(size=(30, 60))))
        (model,) = server.ask("/v1/models").json["models"]
    assert model["kind"] == "masks"
    for prediction, size in zip(reply.json["predictions"], [(50, 40), (30, 60)], strict=True):
        assert prediction["degree"] == 3  # which is fixed
        mask = Image.open(io.BytesIO(b64decode(prediction["mask"])))
        assert mask.size == size
        assert prediction["share"] == pytest.approx((np.asarray(mask) > 127).mean())


def test_the_models_are_listed(server, cars):
    models = server.ask("/v1/models").json["models"]
    assert [(model["name"], model["default"]) for model in models] == [
        ("pets", True),
        ("cars", False),
    ]
    assert models[1]["classes"] == list(cars.classes())
    assert (
        models[1]["revision"]
        == server.predict(file(picture()), query="?model=cars").json["revision"]
    )


def test_the_degrees_are_listed(server, pets):
    reply = server.ask("/v1/degrees?model=pets").json
    model = pets.model()
    assert [row["degree"] for row in reply["degrees"]] == list(model.degrees)
    assert reply["degrees"][3]["gmacs"] == pytest.approx(model.cost(3).gmacs)
    assert all(row["ms"] > 0 for row in reply["degrees"])
    assert reply["degree"] in model.degrees


def test_the_best_degree_is_the_most_accurate_one(server, monkeypatch):
    for accuracies, best in (({}, 0), ({0: 0.7, 1: 0.9, 2: 0.8}, 1)):
        monkeypatch.setattr(
            ModelCatalog,
            "accuracy",
            lambda self, name, degree, of=accuracies: of.get(degree),
        )
        reply = server.predict(file(picture()), query="?degree=best")
        assert reply.json["predictions"][0]["degree"] == best


def test_as_many_classes_as_are_asked_for(server):
    for asked, returned in ((2, 2), (9, 3)):  # the model has three
        reply = server.predict(file(picture()), query=f"?top={asked}")
        assert len(reply.json["predictions"][0]["classes"]) == returned


def cut(image: bytes) -> bytes:
    return image[: len(image) // 2]


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header tells of many pixels, of which there is one."""
    tiny = file(Image.new("L", (1, 1)))
    size = width.to_bytes(4) + height.to_bytes(4)
    header = b"IHDR" + size + tiny[24:29]
    return tiny[:12] + header + zlib.crc32(header).to_bytes(4) + tiny[33:]


MISTAKES = {
    "no image": ((b"text", PNG), 422, "not_an_image", "images[0]"),
    "nothing": ((b"", PNG), 422, "not_an_image", "images[0]"),
    "half an image": ((cut(file(picture())), PNG), 422, "not_an_image", "images[0]"),
    "the second is broken": (form(file(picture()), b"x"), 422, "not_an_image", "images[1]"),
    "a format that is not taken": ((file(picture(), "ICO"), PNG), 422, "not_an_image", "images[0]"),
    "a postscript": ((b"%!PS-Adobe-3.0", PNG), 422, "not_an_image", "images[0]"),
    "a bomb": ((bomb(60_000, 60_000), PNG), 413, "too_many_pixels", "images[0]"),
    "too many pixels": ((bomb(8000, 7000), PNG), 413, "too_many_pixels", "images[0]"),
    "many scans": ((b"\xff\xd8" + 200 * b"\xff\xda", PNG), 422, "not_an_image", "images[0]"),
    "too many images": (form(*5 * [file(picture())]), 413, "too_many_images", "images"),
    "too many in JSON": (text(*5 * [b"x"]), 413, "too_many_images", "images"),
    "an empty form": (
        (b"--x--\r\n", FORM),
        422,
        "no_images",
        "images",
    ),
    "no boundary": ((b"--x--\r\n", "multipart/form-data"), 400, "broken_form", None),
    "a broken form": ((b"-x", FORM), 400, "broken_form", None),
    "half a form": ((cut(form(b"x")[0]), form()[1]), 400, "broken_form", None),
    "an odd charset": (
        (form(b"x", name="\xff")[0], FORM + "; charset=undefined"),
        422,
        "invalid",
        "\xff",
    ),
    "text in a form": (
        (form(b"x")[0].replace(b"; filename", b"; file"), form()[1]),
        422,
        "invalid",
        "images",
    ),
    "another part": (form(b"x", name="secret"), 422, "invalid", "secret"),
    "no JSON": ((b"{", JSON), 400, "broken_json", None),
    "not UTF-8": ((b'{"images": ["\xff"]}', JSON), 400, "broken_json", None),
    "no list": ((b'{"images": "x"}', JSON), 422, "invalid", "images"),
    "no strings": ((b'{"images": ["", 3]}', JSON), 422, "invalid", "images[1]"),
    "no images": ((b"{}", JSON), 422, "invalid", "images"),
    "an empty list": (text(), 422, "invalid", "images"),
    "not base64": ((b'{"images": ["?"]}', JSON), 422, "not_base64", "images[0]"),
    "a path": (
        (b'{"images": ["/etc/passwd"]}', JSON),
        422,
        "not_base64",
        "images[0]",
    ),
    "an address": (
        (b'{"images": ["http://localhost/x.png"]}', JSON),
        422,
        "not_base64",
        "images[0]",
    ),
    "an unknown field": (text(b"x", path="/etc/passwd"), 422, "invalid", "path"),
    "text for a number": (text(b"x", top="3"), 422, "invalid", "top"),
    "a degree that is not offered": (text(b"x", degree=99), 422, "invalid", "degree"),
    "text for a degree": (text(b"x", degree="low"), 422, "invalid", "degree"),
    "a deadline of never": (text(b"x", deadline_ms=float("inf")), 422, "invalid", "deadline_ms"),
    "a deadline of a day": (text(b"x", deadline_ms=86_400_000), 422, "invalid", "deadline_ms"),
    "another model": (text(b"x", model="dogs"), 404, "unknown_model", "model"),
    "no type": ((b"x", "text/plain"), 415, "unsupported_media_type", "Content-Type"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_request_gets_its_status_code_and_field(server, name):
    request, status, code, field = MISTAKES[name]
    reply = server.ask("/v1/predict", *request)
    assert (reply.status, reply.error["code"], reply.error["field"]) == (status, code, field)
    assert "\n" not in reply.error["message"]
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("query", "status", "field"),
    [
        ("degree=low", 422, "degree"),
        ("degree=-1", 422, "degree"),
        ("top=0", 422, "top"),
        ("deadline_ms=nan", 422, "deadline_ms"),
        ("url=http://localhost/", 422, "url"),
        ("model=" + 200 * "x", 422, "model"),
        ("model=dogs", 404, "model"),
    ],
)
def test_a_wrong_query_parameter_is_named(server, query, status, field):
    reply = server.ask(f"/v1/predict?{query}", file(picture()), PNG)
    assert (reply.status, reply.error["field"]) == (status, field)


def test_options_of_json_are_not_taken_from_the_query(server):
    reply = server.ask("/v1/predict?top=1", *text(file(picture())))
    assert (reply.status, reply.error["field"]) == (422, "top")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/models/", 404), ("PUT", "/v1/predict", 405)],
)
def test_other_paths_and_methods_have_the_same_form(server, method, path, status):
    reply = server.ask(path, method=method)
    assert reply.status == status
    assert reply.error["message"]


def test_the_description_needs_no_other_machine(server):
    reply = server.ask("/openapi.json")
    assert {"/v1/predict", "/v1/models", "/v1/degrees", "/v1/live"} <= reply.json["paths"].keys()
    assert b"http" not in reply.body.replace(b'"http"', b"").replace(b"HTTP", b"")


@pytest.mark.parametrize("where", ["prepare", "run"])
def test_a_failure_of_the_server_is_logged_and_not_shown(server, monkeypatch, caplog, where):
    def fails(*_):
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        if where == "run":
            patch.setattr(server.engine, "_run", fails)
        else:
            tasks = server.served.supervisor.catalog.models
            patch.setitem(tasks, "pets", replace(tasks["pets"], transform=attrgetter("secret")))
        reply = server.predict(file(picture()))
    assert (reply.status, reply.error["code"]) == (500, "internal")
    assert b"secret" not in reply.body
    assert server.predict(file(picture())).status == 200
    assert "secret" in caplog.text


def test_the_live_numbers_are_consistent(server):
    server.predict(file(picture()), file(picture(1)))
    live = server.ask("/v1/live").json
    assert live["answered"] >= 2
    assert live["p50_ms"] <= live["p99_ms"]
    assert live["refused"].keys() == {"full", "late", "lost", "draining"}


def test_the_metrics_are_complete(server):
    server.predict(file(picture()), query="?degree=3")
    reply = server.ask("/metrics")
    lines = dict(line.rsplit(" ", 1) for line in reply.body.decode().splitlines() if line[0] != "#")
    assert float(lines['tokendial_latency_seconds_count{degree="3",model="pets"}']) >= 1
    assert float(lines['tokendial_latency_seconds_bucket{degree="3",le="60.0",model="pets"}']) >= 1
    assert float(lines["tokendial_answered_images_total"]) >= 1
    assert lines['tokendial_refused_images_total{reason="full"}'] == "0.0"
    assert float(lines['tokendial_responses_total{status="200"}']) >= 1
    assert lines["tokendial_queued_images"] == "0.0"
    assert lines['tokendial_accuracy_estimate{model="pets"}'] == "NaN"
    assert {"tokendial_degree", "process_resident_memory_bytes"} <= lines.keys()
