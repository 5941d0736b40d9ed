"""The causes under which bad data is counted: how some are found, and what they mean."""

__all__ = ["explain", "format_cause", "printable"]

_REPACK = "unpack it with: {} OLD > NEW.tar"
_EXPLANATIONS = {
    "json_entry_missing": "the JSON does not have the entry of data.captions, or it is null",
    "json_entry_no_text": "neither a text nor a list of texts",
    "member_extension": "unknown; known are jpg, jpeg, png, webp, gif, txt, cls and json",
    "member_hidden": "files of the system, not of the user",
    "member_link": "not followed; tar -h --hard-dereference stores the files instead",
    "member_special": "neither a whole file nor a link; tar without -S stores sparse files whole",
    "member_surplus": "a second image or text, or a name that extends the key of a sample",
    "members_apart": "members of a sample must stand together in the tar, as tar --sort=name does",
    "shard_bzip2": f"compressed with bzip2; {_REPACK.format('bzip2 -dc')}",
    "shard_cut": "broken or cut off; the samples before that place are used",
    "shard_empty": "a tar without samples",
    "shard_git_lfs": "a Git LFS pointer instead of the file; fetch it with: git lfs pull",
    "shard_gzip": f"compressed with gzip; {_REPACK.format('gzip -dc')}",
    "shard_lz4": f"compressed with lz4; {_REPACK.format('lz4 -dc')}",
    "shard_web_page": "an HTML or XML page, such as a server's error message; fetch it again",
    "shard_xz": f"compressed with xz; {_REPACK.format('xz -dc')}",
    "shard_zip": "a zip archive; unpack it and make a tar of the files",
    "shard_zstd": f"compressed with zstd; {_REPACK.format('zstd -dc')}",
}
_MAX_CHARACTERS = 1000  # of a name in a message
_FIRST_BYTES = (
    (b"\x1f\x8b", "shard_gzip"),
    (b"BZh", "shard_bzip2"),
    (b"\xfd7zXZ\0", "shard_xz"),
    (b"\x28\xb5\x2f\xfd", "shard_zstd"),
    (b"\x04\x22\x4d\x18", "shard_lz4"),
    (b"PK\3\4", "shard_zip"),
    (b"version https://git-lfs.github.com/", "shard_git_lfs"),
    (b"<", "shard_web_page"),
)


def explain(cause: str) -> str:
    """Return a cause for a message, with its meaning where the name does not say it all."""
    meaning = _EXPLANATIONS.get(cause.rpartition("/")[2])  # after the place of a caption
    return f"{cause} ({meaning})" if meaning else cause


def printable(name: str) -> str:
    """Return a name, which may hold anything, with escapes for what is no text, and not too long.

    Line ends, other control characters and bytes that are not UTF-8 are no text.
    """
    text = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in name[:_MAX_CHARACTERS]
    )
    return text if len(name) <= _MAX_CHARACTERS else f"{text}..."


def format_cause(start: bytes) -> str | None:
    """Return the cause for a file that is no tar, by its first bytes; None for another format."""
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()  # a page may begin with blanks
    return next((cause for first, cause in _FIRST_BYTES if start.startswith(first)), None)
