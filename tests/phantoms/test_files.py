"""Whatever the file format, the same physical scan comes back; SimpleITK and zipfile are the second opinion."""

import zipfile
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from darnet.decode import write_volume
from darnet.phantom import make_phantom
from darnet.phantoms.canvas import Phantom
from darnet.phantoms.files import Axes, DicomStyle, write_dicom, write_slice_images, write_zip
from darnet.scan import Diagnosis

SYNTAXES = [ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless]
STYLES = [DicomStyle(axes=axes, feet_first=feet_first) for axes in Axes for feet_first in (False, True)]


@pytest.fixture(scope="module")
def phantom() -> Phantom:
    return make_phantom(Diagnosis.NCP, 7, shape=(12, 64, 72), spacing_mm=(22.0, 5.5, 5.25))


def read_series(folder: Path) -> sitk.Image:
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def sample(image: sitk.Image, reference: sitk.Image) -> np.ndarray:
    """Values of an image at the physical points of a reference."""
    return sitk.GetArrayFromImage(sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor, -3000))


@pytest.mark.parametrize("syntax", SYNTAXES, ids=lambda uid: uid.name)
@pytest.mark.parametrize("intercept", [-1024, -1000, 0])
def test_dicom_reads_back_equal(phantom, tmp_path, syntax, intercept):
    write_dicom(phantom, tmp_path, style=DicomStyle(transfer_syntax=syntax, rescale_intercept=intercept))
    image = read_series(tmp_path)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image)[::-1], phantom.voxels_hu)
    np.testing.assert_allclose(image.GetSpacing()[::-1], phantom.spacing_mm)


def test_dicom_paths_are_head_first_and_names_are_not(phantom, tmp_path):
    paths = write_dicom(phantom, tmp_path)
    heights = [float(pydicom.dcmread(path).ImagePositionPatient[2]) for path in paths]
    assert heights == sorted(heights, reverse=True)
    assert paths != sorted(paths)
    assert sorted(paths) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("style", STYLES, ids=lambda style: f"{style.axes}-{'feet' if style.feet_first else 'head'}")
def test_any_orientation_is_the_same_physical_scan(phantom, tmp_path, style):
    write_dicom(phantom, tmp_path / "standard")
    write_dicom(phantom, tmp_path / "turned", style=style)
    standard, turned = read_series(tmp_path / "standard"), read_series(tmp_path / "turned")
    np.testing.assert_array_equal(sample(turned, standard), sitk.GetArrayFromImage(standard))


def test_feet_first_counts_instances_from_the_feet(phantom, tmp_path):
    paths = write_dicom(phantom, tmp_path, style=DicomStyle(feet_first=True))
    numbers = [int(pydicom.dcmread(path).InstanceNumber) for path in paths]
    assert numbers == list(range(len(paths), 0, -1))


def test_the_patient_right_lung_lies_at_negative_x(phantom, tmp_path):
    write_dicom(phantom, tmp_path)
    image = read_series(tmp_path)
    liver = phantom.voxels_hu[9] > 20  # the right dome of the diaphragm stands above the left
    columns = np.nonzero(liver)[1]
    assert image.TransformIndexToPhysicalPoint((int(columns.mean()) - 10, 32, 2))[0] < 0


def test_identifiers_follow_from_patient_and_series(phantom, tmp_path):
    first = pydicom.dcmread(write_dicom(phantom, tmp_path / "a")[0])
    again = pydicom.dcmread(write_dicom(phantom, tmp_path / "b")[0])
    other = pydicom.dcmread(write_dicom(phantom, tmp_path / "c", series=2)[0])
    assert first.SeriesInstanceUID == again.SeriesInstanceUID != other.SeriesInstanceUID
    assert first.StudyInstanceUID == other.StudyInstanceUID
    assert first.SOPInstanceUID != other.SOPInstanceUID
    assert first.PatientID == "PHANTOM-000007"


def test_written_twice_the_files_are_the_same_bytes(phantom, tmp_path):
    first, second = write_dicom(phantom, tmp_path / "a"), write_dicom(phantom, tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_written_volume_lies_in_the_patient_as_nibabel_reads_it(phantom, tmp_path, suffix):
    write_volume(tmp_path / f"scan{suffix}", phantom.voxels_hu, phantom.spacing_mm)
    image = nibabel.load(tmp_path / f"scan{suffix}")
    axes = nibabel.orientations.axcodes2ornt(("L", "P", "I"))
    canonical = image.as_reoriented(
        nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(image.affine), axes)
    )
    np.testing.assert_array_equal(np.asarray(canonical.dataobj).T, phantom.voxels_hu)
    np.testing.assert_allclose(canonical.header.get_zooms()[::-1], phantom.spacing_mm, rtol=1e-6)


def test_slice_images_are_head_first_in_natural_order(phantom, tmp_path):
    paths = write_slice_images(phantom, tmp_path)
    assert [path.name for path in paths] == [f"{number}.png" for number in range(1, 13)]
    images = np.stack([cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in paths])
    assert images.dtype == np.uint8
    expected = np.interp(phantom.voxels_hu, [-1350, 150], [0, 255])
    assert np.abs(images - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize(("suffix", "tolerance"), [(".tif", 0.51), (".jpg", 25)])
def test_other_image_formats_hold_the_same_picture(phantom, tmp_path, suffix, tolerance):
    images = np.stack([cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in write_slice_images(phantom, tmp_path, suffix)])
    expected = np.interp(phantom.voxels_hu, [-1350, 150], [0, 255])
    assert np.quantile(np.abs(images - expected), 0.99) <= tolerance


def test_an_unknown_format_is_refused(phantom, tmp_path):
    with pytest.raises(ValueError, match="suffix"):
        write_slice_images(phantom, tmp_path, ".bmp")


def test_a_zip_holds_the_folder_and_is_repeatable(phantom, tmp_path):
    paths = write_slice_images(phantom, tmp_path / "scan")
    first, second = write_zip(tmp_path / "scan", tmp_path / "a.zip"), write_zip(tmp_path / "scan", tmp_path / "b.zip")
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [f"scan/{path.name}" for path in paths]
        assert archive.read("scan/1.png") == paths[0].read_bytes()
