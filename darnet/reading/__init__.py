"""Bytes of scans that may be damaged or hostile: headers, series, slice order, volumes, a child process to read in."""
