"""Parquet files, where pyarrow is installed: the same rows as the lines of a JSON file.

pyarrow is no requirement of minmacpo; it is imported when such a file is read.
"""

from collections.abc import Iterator
from pathlib import Path

from minmacpo import UserError
from minmacpo.data.file_kinds import PARQUET, conversion

BATCH = 256  # rows that are in memory at once


def read_parquet(file: Path) -> Iterator[tuple[int, dict]]:
    """(number from 1, row) of the rows of a parquet file.

    Raises:
        UserError: pyarrow is not installed, or the file is broken.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file}: is a parquet file, which is read where pyarrow is installed: pip install "
            f"pyarrow; or {conversion(PARQUET, file)}"
        ) from None

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}, after row {number}: cannot be read ({reason})") from None
