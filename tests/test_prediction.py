"""Images become the numbers that networks were evaluated on, and these become classes."""

from __future__ import annotations

import pytest
import timm.data as timm_data
import torch
from cases import randn
from PIL import Image
from safetensors.torch import save_file

from cotnet_ext import reference
from cotnet_ext.checkpoints import CheckpointError
from cotnet_ext.models import VARIANTS, create_model
from cotnet_ext.prediction import (
    ImageError,
    Preparation,
    attention_of,
    classify,
    find_images,
    load_classifier,
    read_labels,
)
from cotnet_ext.prediction.attention import choose_layers, default_layers
from cotnet_ext.prediction.images import check_image
from cotnet_ext.prediction.picture import field

NETWORK = VARIANTS["cotnet50"]


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth colours with a little noise, in which a shift by one pixel shows."""
    values = randn(height, width, 3, key=(width, height)) * 8 + 127
    values += 60 * torch.sin(torch.arange(width) / 9).view(1, -1, 1)
    values += 60 * torch.cos(torch.arange(height) / 7).view(-1, 1, 1)
    return Image.fromarray(values.clamp(0, 255).to(torch.uint8).numpy()).convert(mode)


# ---- Images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
@pytest.mark.parametrize("size", [(300, 200), (201, 333), (13, 9), (224, 224)])
def test_prepared_images_are_those_of_timm(tmp_path, size, mode):
    path = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    picture(*size, mode).save(path)
    for name in ("cotnet50", "se_cotnetd_152", "se_cotnetd_152_L"):
        cfg = VARIANTS[name].pretrained_cfg()
        config = timm_data.resolve_data_config({}, pretrained_cfg=cfg)
        transform = timm_data.create_transform(**config)
        expected = transform(Image.open(path).convert("RGB"))
        actual = Preparation.of(VARIANTS[name]).read(path)
        assert actual.shape == cfg["input_size"]
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


def test_restored_images_are_what_was_cut_out(tmp_path):
    picture(256, 256).save(tmp_path / "image.png")
    preparation = Preparation.of(NETWORK)
    shown = preparation.restore(preparation.read(tmp_path / "image.png"))
    expected = torch.frombuffer(
        bytearray(picture(256, 256).crop((16, 16, 240, 240)).tobytes()), dtype=torch.uint8
    )
    torch.testing.assert_close(shown * 255, expected.view(224, 224, 3).float(), rtol=0, atol=1e-3)


def test_another_size(tmp_path):
    picture(80, 60).save(tmp_path / "image.png")
    assert Preparation.of(NETWORK, 64).read(tmp_path / "image.png").shape == (3, 64, 64)


def test_pictures_are_turned_upright(tmp_path):
    image = picture(120, 80)
    image.save(tmp_path / "upright.png")
    turned = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    preparation = Preparation.of(NETWORK, 64)
    upright, turned = (preparation.read(tmp_path / f"{name}.png") for name in ("upright", "turned"))
    torch.testing.assert_close(turned, upright)


def test_greys_of_16_bits_are_scaled(tmp_path):
    grey = picture(70, 50, "L")
    grey.save(tmp_path / "8.png")
    wide = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(50, 70)
    wide = (wide.to(torch.int32) * 256).to(torch.uint16)
    Image.fromarray(wide.numpy()).save(tmp_path / "16.png")
    assert Image.open(tmp_path / "16.png").mode.startswith("I;16")
    preparation = Preparation.of(NETWORK, 64)
    eight, sixteen = (preparation.read(tmp_path / f"{name}.png") for name in ("8", "16"))
    torch.testing.assert_close(sixteen, eight)


def test_folders_are_searched(tmp_path):
    names = ["b.PNG", "a.jpg", "deep/c.webp"]
    (tmp_path / "deep").mkdir()
    for name in names:
        picture(9, 9).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._a.jpg").write_text("what some systems leave beside a file")
    (tmp_path / "folder.png").mkdir()
    assert find_images([tmp_path]) == [tmp_path / name for name in sorted(names)]
    assert find_images([tmp_path / "b.PNG", tmp_path / "a.jpg"]) == [
        tmp_path / "b.PNG",
        tmp_path / "a.jpg",
    ]


def test_what_is_no_image(tmp_path):
    preparation = Preparation.of(NETWORK, 64)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder").mkdir()
    picture(400, 300).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    Image.new("RGB", (3, 301)).save(tmp_path / "narrow.png")
    for name, reason in (
        ("missing.png", "cannot read {}: No such file or directory"),
        ("text.png", "{} is no image that Pillow can read"),
        ("empty.jpg", "{} is no image that Pillow can read"),
    ):
        with pytest.raises(ImageError) as refused:
            check_image(tmp_path / name)
        assert str(refused.value) == reason.format(repr(str(tmp_path / name)))
        with pytest.raises(ImageError):
            preparation.read(tmp_path / name)
    with pytest.raises(ImageError, match=r"half.jpg' is damaged: image file is truncated"):
        preparation.read(tmp_path / "half.jpg")
    with pytest.raises(ImageError, match="narrow.png' is damaged: 3 x 301 pixels are too narrow"):
        preparation.read(tmp_path / "narrow.png")
    with pytest.raises(ImageError, match=r"folder' has no images \(.avif, .bmp"):
        find_images([tmp_path / "folder"])


def test_images_that_would_fill_the_memory(tmp_path, monkeypatch):
    picture(60, 60).save(tmp_path / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="image.png' is too large: Image size"):
        check_image(tmp_path / "image.png")


# ---- Labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\n",
        "\ufeffcat\r\ndog\r\n\r\n",
        '["cat", "dog"]',
        '{"1": "dog", "0": "cat"}',
        '{"0": ["n02123045", "cat"], "1": ["n02084071", "dog"]}',
    ],
)
def test_labels(tmp_path, text):
    (tmp_path / "labels").write_text(text, encoding="utf-8", newline="")
    assert read_labels(tmp_path / "labels", 2) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"cat\n", "has 1 names, expected 2"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (b'["cat", "dog"', "is no JSON list of names, or dict by index"),
        (b'{"cat": 0, "dog": 1}', "is no JSON list of names, or dict by index"),
    ],
)
def test_bad_labels(tmp_path, data, reason):
    path = tmp_path / "labels"
    path.write_bytes(data)
    with pytest.raises(ValueError) as refused:
        read_labels(path, 2)
    assert str(refused.value) == f"{str(path)!r} {reason}"


# ---- Networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with a CoTNet-50 for ten classes whose blocks do more than their shortcuts."""
    torch.manual_seed(0)
    model = create_model("cotnet50", num_classes=10)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    path = tmp_path_factory.mktemp("weights") / "ten.safetensors"
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def model(weights):
    return load_classifier("cotnet50", weights)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for index in range(5):
        picture(60 + index, 50).save(folder / f"{index}.png")
    return folder


def test_the_file_decides_the_classes(model):
    assert model.num_classes == 10
    assert not model.training


def test_loading_fills_everything(tmp_path):
    """Also the filters of the blur pooling, which no file has."""
    expected = create_model("se_cotnetd_152", num_classes=2)
    save_file(expected.state_dict(), tmp_path / "w.safetensors")
    actual = load_classifier("se_cotnetd_152", tmp_path / "w.safetensors")
    for tensors in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(model, tensors)()) for model in (actual, expected))
        assert list(found) == list(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert all(found[key].requires_grad == wanted[key].requires_grad for key in wanted)


def test_predictions_are_the_softmax_of_the_network(model, images):
    preparation = Preparation.of(NETWORK, 64)
    paths = find_images([images])
    with torch.no_grad():
        expected = model(torch.stack([preparation.read(path) for path in paths])).softmax(1)
    for batch_size in (2, 8):
        counts: list[int] = []
        found = list(
            classify(model, preparation, paths, batch_size=batch_size, top_k=3, done=counts.append)
        )
        assert [prediction.path for prediction in found] == paths
        assert sum(counts) == 5 and max(counts) == min(batch_size, 5)
        for prediction, probabilities in zip(found, expected, strict=True):
            best = probabilities.topk(3)
            assert prediction.classes == tuple(best.indices.tolist())
            torch.testing.assert_close(
                torch.tensor(prediction.probabilities), best.values, rtol=1e-4, atol=1e-6
            )


def test_no_more_classes_than_there_are(model, images):
    (prediction,) = classify(model, Preparation.of(NETWORK, 64), [images / "0.png"], top_k=99)
    assert sorted(prediction.classes) == list(range(10))
    assert sum(prediction.probabilities) == pytest.approx(1)


def test_damaged_images_do_not_stop_the_others(model, images, tmp_path):
    data = (images / "1.png").read_bytes()
    half = tmp_path / "half.png"
    half.write_bytes(data[: len(data) // 2])
    paths = [images / "0.png", half, images / "2.png"]
    for batch_size in (1, 3):
        first, bad, last = classify(
            model, Preparation.of(NETWORK, 64), paths, batch_size=batch_size
        )
        assert len(first.classes) == len(last.classes) == 5
        assert bad.classes == () and "half.png' is damaged" in bad.error


def test_results_that_are_not_finite(model, images):
    before = model.fc.bias.data
    model.fc.bias.data = before + torch.tensor([0.0, torch.nan]).repeat(5)
    with pytest.raises(ArithmeticError, match="not finite, torch.float32"):
        list(classify(model, Preparation.of(NETWORK, 64), [images / "0.png"]))
    model.fc.bias.data = before


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("fc.weight", None, "has no classifier"),
        ("conv1.weight", torch.zeros(64, 1, 7, 7), "is for images of 1 channels, expected 3"),
        ("bn1.weight", None, "does not fit cotnet50: 1 missing, first 'bn1.weight'"),
    ],
)
def test_files_that_cannot_be_used(model, tmp_path, key, value, reason):
    tensors = dict(model.state_dict())
    if value is None:
        del tensors[key]
    else:
        tensors[key] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as refused:
        load_classifier("cotnet50", tmp_path / "bad.safetensors")
    assert reason in str(refused.value)


# ---- Attention -----------------------------------------------------------------------------------


def test_attention_is_what_the_layers_sum_with(weights):
    """With these weights the reference's aggregation gives what goes into the layer's norm."""
    for name in ("cotnet50", "cotnext50_2x48d"):
        torch.manual_seed(0)
        model = create_model(name, num_classes=2, reference=True).double().eval()
        ours = create_model(name, num_classes=2).double().eval()
        ours.load_state_dict(model.state_dict())
        seen = {}
        layer = model.layer2[1].conv2
        layer.local_conv.register_forward_hook(lambda m, a, y, seen=seen: seen.update(y=y, v=a[0]))
        images = randn(2, 3, 64, 64, key=name)
        with torch.no_grad():
            model(images)
        found = attention_of(ours, images, ["layer2.1.conv2"])["layer2.1.conv2"]
        groups = 1 if name == "cotnet50" else 2
        found = found.double().unflatten(1, (groups, -1)).flatten(0, 1).unsqueeze(1)
        expected = reference.local_aggregation(seen["v"], found, 3, padding=1)
        torch.testing.assert_close(seen["y"], expected, rtol=1e-4, atol=1e-4)


def test_attention_leaves_no_hooks(model):
    attention_of(model, randn(1, 3, 64, 64, dtype=torch.float32), default_layers(model))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_layers_are_chosen_by_names_and_patterns(model):
    last = ["layer1.2.conv2", "layer2.3.conv2", "layer3.5.conv2", "layer4.2.conv2"]
    assert default_layers(model) == last
    assert choose_layers(model, ["layer4.2", "layer1.0.conv2"]) == [
        "layer1.0.conv2",
        "layer4.2.conv2",
    ]
    assert choose_layers(model, ["layer4.*"]) == [f"layer4.{i}.conv2" for i in range(3)]
    with pytest.raises(ValueError) as refused:
        choose_layers(model, ["layr4.1.conv2"])
    assert str(refused.value) == (
        "no contextual layer is named 'layr4.1.conv2'; did you mean 'layer4.1.conv2'? "
        "There are 16, from 'layer1.0.conv2' to 'layer4.2.conv2'"
    )


def test_the_field_points_to_the_centre_of_the_weights():
    weights = torch.zeros(2, 9, 1, 3)
    weights[:, 4, 0, 0] = 1.0  # the pixel itself
    weights[:, 5, 0, 1] = -2.0  # its right neighbour, whatever the sign
    weights[:, 7, 0, 2] = 3.0  # the one below
    strength, right, down = field(weights)
    torch.testing.assert_close(strength, torch.tensor([[1.0, 2.0, 3.0]]) / 9)
    torch.testing.assert_close(right, torch.tensor([[0.0, 1.0, 0.0]]))
    torch.testing.assert_close(down, torch.tensor([[0.0, 0.0, 1.0]]))
