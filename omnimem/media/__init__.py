"""Media: PyAV decoding by timestamp, resizing, patches and mel in torch, and sources that yield streams in segments."""

from omnimem.media.container import MediaError, MediaInfo, probe
from omnimem.media.decode import read_audio, read_audio_blocks, read_frames
from omnimem.media.frames import FrameList, Video, files_of
from omnimem.media.live import read_live
from omnimem.media.mel import LogMel, RunningMel
from omnimem.media.pixels import patchify, resize, smart_resize
from omnimem.media.source import Decoded, FileSource, Geometry, LiveSource, Segment, Source, SourceOptions, TracksOption

__all__ = [
    "Decoded",
    "FileSource",
    "FrameList",
    "Geometry",
    "LiveSource",
    "LogMel",
    "MediaError",
    "MediaInfo",
    "RunningMel",
    "Segment",
    "Source",
    "SourceOptions",
    "TracksOption",
    "Video",
    "files_of",
    "patchify",
    "probe",
    "read_audio",
    "read_audio_blocks",
    "read_frames",
    "read_live",
    "resize",
    "smart_resize",
]
