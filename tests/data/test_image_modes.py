"""Image files of every mode that Pillow has: their values keep order and range, or the mode is refused by name."""

import struct

import numpy as np
import pytest
from PIL import Image

from fastkd import data
from fastkd.data.decoding import UnreadableImage, as_rgb, open_image

RAMP = np.tile(np.arange(256, dtype=np.uint8), (2, 1))  # [2, 256], grey from black to white
GREY = Image.fromarray(RAMP)
REFUSED = {"I": "32-bit integers", "F": "32-bit floats"}


def of_mode(mode):
    """The ramp in a mode of Pillow's."""
    if mode.startswith("I;16"):
        wide = RAMP.astype(">u2" if mode == "I;16B" else "<u2") * 257
        return Image.frombytes(mode, GREY.size, wide.tobytes())
    if mode == "LAB":
        return Image.merge("LAB", (GREY, *[Image.new("L", GREY.size, 128)] * 2))
    if mode in ("La", "RGBa"):
        return GREY.convert(f"{mode[:-1]}A").convert(mode)
    return GREY.convert(mode) if mode in ("1", "I", "F", "LA", "P", "PA") else GREY.convert("RGB").convert(mode)


def row(image):
    """uint8 [W] of an RGB image all of whose channels are grey, its first row."""
    pixels = np.asarray(image).astype(int)
    assert image.mode == "RGB" and np.ptp(pixels, axis=2).max() <= 3  # what LAB and YCbCr round
    return pixels[0, :, 0]


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_keeps_order_and_range_or_is_refused_by_name(mode):
    if mode in REFUSED:
        with pytest.raises(
            ValueError, match=rf"its pixels are {REFUSED[mode]} \(mode {mode}\), .*save it with 8 or 16"
        ):
            as_rgb(of_mode(mode))
        return
    found = row(as_rgb(of_mode(mode)))
    if mode == "1":  # dithered
        assert set(found) == {0, 255} and found[0] == 0 and found[-1] == 255
    elif mode == "P":  # Pillow's own palette of 6 greys
        assert found[0] == 0 and found[-1] == 255 and np.abs(found - RAMP[0]).max() < 51
    elif mode == "LAB":  # lightness is no linear measure of the values: black, white and order tell
        assert found[0] <= 1 and found[-1] >= 254 and (np.diff(found) >= 0).all()
    else:
        assert np.abs(found - RAMP[0]).max() <= (mode == "YCbCr")


def tiff(path, values, bits, white_is_zero=False):
    """A grey TIFF of 12 or 16 bits, written by hand: Pillow writes neither 12 bits nor white as zero."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(np.uint32)  # two pixels in three bytes
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
        pixels = packed.astype(np.uint8).tobytes()
    else:
        pixels = values.astype("<u2").tobytes()
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, int(not white_is_zero)), (273, 0)]
    tags += [(277, 1), (278, height), (279, len(pixels))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + pixels)


def test_sixteen_bits_of_a_file_keep_their_levels(tmp_path):
    """32 levels along a row, as v / 257; 12 bits as v * 255 / 4095."""
    wide = np.tile(np.arange(32) * 65535 // 31, (2, 1))  # [2, 32]
    expected = np.rint(wide[0] / 257).astype(int)
    Image.fromarray(wide.astype(np.uint16)).save(tmp_path / "grey.png")
    Image.fromarray(wide.astype(np.uint16)).save(tmp_path / "grey.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 32 2 65535\n" + wide.astype(">u2").tobytes())
    tiff(tmp_path / "twelve.tif", wide >> 4, 12)
    tiff(tmp_path / "inverted.tif", 65535 - wide, 16, white_is_zero=True)
    for name in ("grey.png", "grey.tif", "grey.pgm", "inverted.tif"):
        assert row(open_image(str(tmp_path / name))).tolist() == expected.tolist(), name
    twelve = row(open_image(str(tmp_path / "twelve.tif")))
    assert twelve.tolist() == np.rint((wide[0] >> 4) * 255 / 4095).astype(int).tolist()


def test_a_mode_without_a_range_is_a_file_that_cannot_be_read(tmp_path):
    path = str(tmp_path / "float.tif")
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(path)
    with pytest.raises(UnreadableImage, match=r"float.tif cannot be read \(its pixels are 32-bit floats"):
        open_image(path)
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(path)
    with pytest.raises(UnreadableImage, match="32-bit integers"):
        open_image(path)


@pytest.mark.parametrize("hidden", [0, 90, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_transparency_is_laid_over_white(mode, hidden):
    """What stands under alpha 0 is not seen, half of a black is the middle grey, what is opaque stays."""
    grey, alpha = np.array([[hidden, 0, 40]], dtype=np.uint8), np.array([[0, 128, 255]], dtype=np.uint8)
    image = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    if mode == "PA":  # through a palette of all greys
        image = Image.merge("RGBA", [image.getchannel(0)] * 3 + [image.getchannel(1)]).convert("PA")
    else:
        image = image.convert("RGBA").convert(mode) if mode.startswith("RGB") else image.convert(mode)
    found = row(as_rgb(image))
    assert found[0] == 255 and abs(found[1] - 127) <= 1 and abs(found[2] - 40) <= (20 if mode == "PA" else 0)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "I;16"])
def test_one_value_that_is_transparent(tmp_path, mode):
    """PNG's tRNS."""
    values = np.array([[0, 255, 0, 255]], dtype=np.uint8)
    image = Image.fromarray(values.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(values).convert(mode)
    key = image.getpixel((0, 0)) if mode in ("RGB", "P") else 0
    if mode == "I;16":
        image.info["transparency"] = 0
    else:
        image.save(tmp_path / "key.png", transparency=key)
        image = Image.open(tmp_path / "key.png")
        assert "transparency" in image.info
    assert row(as_rgb(image)).tolist() == [255] * 4


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(tmp_path, form, orientation):
    """EXIF says how the camera was held: the pixels that are stored are turned so that the scene is upright."""
    upright = np.full((24, 32), 40, dtype=np.uint8)
    upright[:8, :8] = 220  # a light corner, top left
    how = Image.Transpose
    stored = {2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM, 5: how.TRANSPOSE, 6: how.ROTATE_90}
    stored |= {7: how.TRANSVERSE, 8: how.ROTATE_270}
    image = Image.fromarray(upright).convert("RGB")
    image = image.transpose(stored[orientation]) if orientation > 1 else image
    exif = Image.Exif()
    exif[274] = orientation
    path = tmp_path / f"photo.{form.lower()}"
    image.save(path, form, exif=exif, **({} if form in ("PNG", "TIFF") else {"quality": 95}))
    found = np.asarray(open_image(str(path)).convert("L")).astype(int)
    assert found.shape == upright.shape and np.abs(found[2:6, 2:6] - 220).max() < 25
    assert np.abs(found[12:, 12:] - 40).max() < 25


def test_damaged_exif_does_not_matter(tmp_path):
    image = Image.new("RGB", (8, 8), (9, 9, 9))
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff rubbish")
    assert open_image(str(tmp_path / "a.jpg")).size == (8, 8)


def test_wide_greys_reach_a_data_set(tmp_path):
    """Two classes of 16-bit images whose difference lies above 8 bits' white."""
    for part in ("train", "test"):
        for name, value in (("dark", 8000), ("light", 56000)):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(np.full((8, 8), value, dtype=np.uint16)).save(tmp_path / part / name / "0.png")
    train = data.load(f"imagefolder:{tmp_path}", augment=False).train
    dark, light = ((image * train.std + train.mean) * 255 for image, _ in train)
    assert abs(dark.mean() - 8000 / 257) < 0.6 and abs(light.mean() - 56000 / 257) < 0.6
