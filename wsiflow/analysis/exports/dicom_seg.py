"""The heatmap of a DICOM slide as a DICOM segmentation of fractional probabilities, which needs ``wsiflow[dicom]``.

The object refers to the instance of level 0 and lies in its frame of reference: pixel spacing is the side of a heatmap
cell in mm, and the origin is the centre of the first cell, by the slide's own origin, orientation and spacing.
Probabilities are stored in steps of 1/255; a cell that is not tissue is 0. Level-0 pixels count from the corner of the
total pixel matrix. Slides of other formats have no instances to refer to, and are left out by name.
"""

import io
import uuid
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import wsiflow
from wsiflow.analysis.exports.export import Note, add_run, each_slide
from wsiflow.analysis.exports.findings import Findings
from wsiflow.analysis.reviewers.format import Format
from wsiflow.errors import EnvironmentFault, InputError
from wsiflow.plan.geometry import l0_from_h_corner
from wsiflow.slides import dicom

if TYPE_CHECKING:
    from pydicom import Dataset

_IDS = uuid.UUID("0f5f2a5e-93f4-4b52-8a2f-3a5a2d5f6f10")
_PLACE = (
    "FrameOfReferenceUID",
    "ImageOrientationSlide",
    "TotalPixelMatrixOriginSequence",
    "SharedFunctionalGroupsSequence",
)
_TILE_PX = 256
_STEPS = 255


def segmentation(found: Findings, source: "Dataset") -> "Dataset":
    """Return the segmentation of a slide; the same findings give the same UIDs and pixels.

    Args:
        found: What the run knows of the slide.
        source: The instance of level 0, without pixels if need be.

    Raises:
        InputError: The instance is not of the size of the run's slide.
    """
    hd = _highdicom()
    _require_place(found, source)
    size = (int(source.TotalPixelMatrixColumns), int(source.TotalPixelMatrixRows))
    if size != (found.frame.l0_width_px, found.frame.l0_height_px):
        cause = (
            f"level 0 is {size[0]} x {size[1]} px, {found.frame.l0_width_px} x {found.frame.l0_height_px} was planned"
        )
        raise InputError(cause, "export where the slide of the run lies", slide=found.slide_id, path=found.path)
    spacing = [float(each) for each in source.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing]
    identity = f"{source.SOPInstanceUID} {found.identity()}"
    made: Dataset = hd.seg.Segmentation(
        source_images=[source],
        pixel_array=np.nan_to_num(found.heat.astype(np.float64))[np.newaxis, :, :, np.newaxis],
        segmentation_type="FRACTIONAL",
        fractional_type="PROBABILITY",
        max_fractional_value=_STEPS,
        segment_descriptions=[_segment(found.class_name)],
        series_instance_uid=_uid(f"series {identity}"),
        series_number=1,
        sop_instance_uid=_uid(f"instance {identity}"),
        instance_number=1,
        manufacturer="wsiflow",
        manufacturer_model_name="wsiflow",
        software_versions=wsiflow.__version__,
        device_serial_number="0",
        pixel_measures=hd.PixelMeasuresSequence([side * found.l0_cell for side in spacing], slice_thickness=0.001),
        plane_positions=[_position(found, source)],
        dimension_organization_type="TILED_FULL",
        omit_empty_frames=False,
        tile_pixel_array=True,
        tile_size=(_TILE_PX, _TILE_PX),
        content_label="PROBABILITY",
    )
    return made


def _require_place(found: Findings, source: "Dataset") -> None:
    """Refuse a slide whose header does not say where its pixels lie on the glass.

    Raises:
        InputError: It does not; the message names what it lacks.
    """
    missing = [name for name in _PLACE if not source.get(name)]
    if missing:
        cause = f"the header has no {', '.join(missing)}, and so no place on the glass"
        raise InputError(cause, "convert the slide to DICOM again", slide=found.slide_id, path=found.path)


def _position(found: Findings, source: "Dataset") -> Any:
    """Return where the centre of the first cell of the heatmap lies on the glass, mm."""
    hd = _highdicom()
    to_glass = hd.spatial.ImageToReferenceTransformer.for_image(source, for_total_pixel_matrix=True)
    centre = np.array([l0_from_h_corner(found.frame, 0, 0)]) + found.l0_cell / 2
    (place,) = to_glass(centre).tolist()
    return hd.PlanePositionSequence("SLIDE", image_position=place, pixel_matrix_position=(1, 1))


def _segment(class_name: str) -> Any:
    hd = _highdicom()
    scheme = "99WSIFLOW"
    family = hd.sr.CodedConcept("123109", "DCM", "Artificial Intelligence")
    return hd.seg.SegmentDescription(
        segment_number=1,
        segment_label=class_name[:64],
        segmented_property_category=hd.sr.CodedConcept("49755003", "SCT", "Morphologically Abnormal Structure"),
        segmented_property_type=hd.sr.CodedConcept(class_name[:16], scheme, class_name[:64]),
        algorithm_type="AUTOMATIC",
        algorithm_identification=hd.AlgorithmIdentificationSequence("wsiflow", family, wsiflow.__version__),
    )


def _uid(text: str) -> str:
    return f"2.25.{uuid.uuid5(_IDS, text).int}"


def _highdicom() -> Any:
    """Return the library, which takes a second to import, and which not everybody needs.

    Raises:
        EnvironmentFault: It is not installed.
    """
    try:
        import highdicom
    except ImportError as error:
        raise EnvironmentFault("DICOM files need highdicom", "pip install 'wsiflow[dicom]'") from error
    return highdicom


def read_source(path: Path) -> "Dataset | None":
    """Return the header of level 0 of a slide: its largest instance; None where the slide is no DICOM."""
    _highdicom()
    import pydicom

    if path.suffix.lower() != dicom.SUFFIX:
        return None
    headers = [pydicom.dcmread(each, stop_before_pixels=True) for each in dicom.files_of_series(path)]
    volumes = [each for each in headers if each.SOPClassUID == dicom.WHOLE_SLIDE and "VOLUME" in each.ImageType]
    return max(volumes, key=lambda each: int(each.TotalPixelMatrixColumns), default=None)


def _files(found: Findings, note: Note) -> dict[str, bytes]:
    source = read_source(found.path)
    if source is None:
        note(
            f"slide {found.slide_id} is left out: a segmentation refers to a slide in DICOM, this is {found.path.name}"
        )
        return {}
    file = io.BytesIO()
    try:
        segmentation(found, source).save_as(file)
    except InputError as error:  # the other slides are written
        note(f"left out: {error}")
        return {}
    return {f"{found.slide_id}.dcm": file.getvalue()}


def _add_options(parser: ArgumentParser) -> None:
    add_run(parser, contours=False)


def _export(arguments: Namespace) -> list[str]:
    return each_slide(arguments, _files)


FORMAT = Format("dicom-seg", "heatmaps of DICOM slides as DICOM segmentations", _add_options, _export)
