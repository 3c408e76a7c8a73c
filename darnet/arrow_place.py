"""An address enters, the file system and path by which pyarrow reaches the same place as `open_store` leave.

pyarrow does not ask boto3 where S3 is; what Ray keeps by it, checkpoints of training, goes where this says.
"""

import pyarrow.fs  # type: ignore[import-untyped]

from darnet.storage_s3 import find_s3_endpoint


def find_arrow_place(uri: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """The file system of the S3 server that boto3's own chain names, and the path there; None and the address itself
    where pyarrow finds the place by it.

    Credentials are each node's own, found anew by pyarrow when they expire, and travel nowhere.
    Raises: UsageError as `find_s3_endpoint`.
    """
    endpoint = find_s3_endpoint() if uri.startswith("s3://") else None
    if endpoint is None:
        return None, uri
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=endpoint.url,
        scheme=endpoint.url.partition("://")[0],
        region=endpoint.region,
        force_virtual_addressing=endpoint.is_virtual,
        tls_ca_file_path=endpoint.ca_file,
    )
    return filesystem, uri.removeprefix("s3://")
