"""`/v1/embeddings`: what the offline model's head reads, by the queue that predictions use."""

import base64
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from serving import file, form, picture, serving, text

from tokendial.runtimes import Runtime

PNG = "image/png"


@pytest.fixture(scope="module")
def server(pets, cars):
    with serving({"pets": pets, "cars": cars}) as server:
        yield server


@torch.no_grad()
def offline(run, image, degree):
    """Features of all tokens, pooled by the head's own method of timm."""
    model = run.model()
    model.set_degree(degree)
    inputs = run.task().image_transform(model.anatomy)(image).unsqueeze(0)
    return model.forward_head(model.forward_features(inputs), pre_logits=True)[0].numpy()


def check(rows, run, images, degree):
    assert [row["index"] for row in rows] == list(range(len(images)))
    for row, image in zip(rows, images, strict=True):
        assert row["degree"] == degree
        np.testing.assert_allclose(row["embedding"], offline(run, image, degree), atol=1e-5)


def test_a_raw_image_gets_the_embedding_of_the_offline_model(server, pets):
    reply = server.ask("/v1/embeddings?degree=0", file(picture()), PNG)
    assert reply.status == 200, reply.body
    check(reply.json["data"], pets, [picture()], 0)
    described = server.ask("/v1/models").json["models"][0]
    assert (reply.json["model"], reply.json["revision"]) == ("pets", described["revision"])
    assert {"queue_ms", "compute_ms", "batch"} <= reply.json["data"][0].keys()


@pytest.mark.parametrize("send", [form, text])
def test_several_images_are_answered_in_their_order(server, cars, send):
    images = [picture(seed, (20 + seed, 30)) for seed in range(3)]
    files = [file(image) for image in images]
    if send is form:
        reply = server.ask("/v1/embeddings?model=cars&degree=3", *form(*files))
    else:
        reply = server.ask("/v1/embeddings", *text(*files, model="cars", degree=3))
    assert reply.status == 200, reply.body
    check(reply.json["data"], cars, images, 3)


def test_base64_holds_the_same_numbers(server, pets):
    query = "degree=2&encoding_format=base64"
    reply = server.ask(f"/v1/embeddings?{query}", file(picture()), PNG)
    (row,) = reply.json["data"]
    numbers = np.frombuffer(base64.b64decode(row["embedding"]), "<f4")
    np.testing.assert_allclose(numbers, offline(pets, picture(), 2), atol=1e-5)
    body = text(file(picture()), degree=2, encoding_format="base64")
    assert server.ask("/v1/embeddings", *body).json["data"][0]["embedding"] == row["embedding"]


def test_a_batch_of_both_kinds_gives_each_image_what_it_asked_for(server, pets):
    """Both wait while the engine is busy, and then run as one batch."""
    with ThreadPoolExecutor(2) as clients:
        with server.busy():
            waiting = [
                clients.submit(server.ask, f"/v1/{route}?degree=1", file(picture(seed)), PNG)
                for seed, route in enumerate(("predict", "embeddings"))
            ]
            while server.engine.status().queued < 2:
                pass
        predicted, embedded = (each.result().json for each in waiting)
    (prediction,), (row,) = predicted["predictions"], embedded["data"]
    assert prediction["batch"] == row["batch"] == 2
    np.testing.assert_allclose(row["embedding"], offline(pets, picture(1), 1), atol=1e-5)
    assert {each["name"] for each in prediction["classes"]} == {"cat", "dog", "hamster"}


def test_a_model_of_masks_gives_the_embeddings_of_its_backbone(masks):
    with serving({"masks": masks}) as server:
        reply = server.ask("/v1/embeddings?degree=0", file(picture()), PNG)
    assert reply.status == 200, reply.body
    model = masks.model()
    model.set_degree(0)
    inputs = masks.task().image_transform(model.anatomy)(picture()).unsqueeze(0)
    with torch.no_grad():
        expected = model.anatomy.vit.forward_head(model.forward_features(inputs))[0]
    np.testing.assert_allclose(reply.json["data"][0]["embedding"], expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"own_process": True, "runtime": Runtime(optimize=True)}],
    ids=["plain", "optimised"],
)
def test_a_model_that_keeps_embeddings_gives_them_on_each_path(embedder, options):
    with serving({"kept": embedder}, **options) as server:
        (model,) = server.ask("/v1/models").json["models"]
        assert (model["kind"], model["classes"]) == ("embeddings", [])
        for path, rows in (("embeddings", "data"), ("predict", "predictions")):
            reply = server.ask(f"/v1/{path}?degree=3", *form(file(picture()), file(picture(1))))
            assert reply.status == 200, reply.body
            check(reply.json[rows], embedder, [picture(), picture(1)], 3)
        view = server.ask("/v1/tokens?degree=3", file(picture()), PNG).json
        check([view["prediction"]], embedder, [picture()], 3)
        assert view["layers"][-1]["tokens"] < view["layers"][0]["tokens"]


@pytest.mark.parametrize(
    ("query", "status", "code", "field"),
    [
        ("degree=99", 422, "invalid", "degree"),
        ("encoding_format=hex", 422, "invalid", "encoding_format"),
        ("top=3", 422, "invalid", "top"),
        ("model=birds", 404, "unknown_model", "model"),
        ("deadline_ms=1e9", 422, "invalid", "deadline_ms"),
    ],
)
def test_mistakes_are_named(server, query, status, code, field):
    reply = server.ask(f"/v1/embeddings?{query}", file(picture()), PNG)
    assert reply.status == status
    assert (reply.error["code"], reply.error["field"]) == (code, field)


def test_a_field_of_predictions_is_none_of_embeddings(server):
    reply = server.ask("/v1/embeddings", *text(file(picture()), top=3))
    assert (reply.status, reply.error["field"]) == (422, "top")


def test_an_image_that_cannot_be_read_is_refused(server):
    reply = server.ask("/v1/embeddings", b"no image", PNG)
    assert (reply.status, reply.error["code"]) == (422, "not_an_image")


@pytest.mark.parametrize(
    "options", [{}, {"runtime": Runtime(optimize=True)}], ids=["plain", "optimised"]
)
def test_a_model_process_answers_as_the_offline_model(pets, options):
    with serving({"pets": pets}, own_process=True, **options) as server:
        reply = server.ask("/v1/embeddings?degree=2", file(picture()), PNG)
    assert reply.status == 200, reply.body
    found, expected = reply.json["data"][0]["embedding"], offline(pets, picture(), 2)
    np.testing.assert_allclose(found, expected, atol=1e-4)
