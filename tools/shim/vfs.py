"""Stand-in for vfs under CPython: littlefs2 as MicroPython has it, the same C code in littlefs-python.

On MicroPython the built-in module is found first.  Imitates extmod/vfs_lfsx.c: its parameters, its errors (OSError with
errno), its ilistdir() and stat(); a file is unbuffered, whatever littlefs keeps of it.  Text mode, chdir() and FAT are
left out; mount() keeps only the table.
"""

from littlefs import LittleFSError, lfs

_EIO = 5
_DIR = 0x4000
_FILE = 0x8000
_ENCODING = "utf-8"
_FLAGS = {
    "r": lfs.LFSFileFlag.rdonly,
    "w": lfs.LFSFileFlag.wronly | lfs.LFSFileFlag.creat | lfs.LFSFileFlag.trunc,
    "a": lfs.LFSFileFlag.wronly | lfs.LFSFileFlag.creat | lfs.LFSFileFlag.append,
    "x": lfs.LFSFileFlag.wronly | lfs.LFSFileFlag.creat | lfs.LFSFileFlag.excl,
}
_mounts = []  # (file system, mount point)


class VfsFat:
    """Only the type, to be refused."""


def mount(fs=None, mount_point=None, *, readonly=False):
    """Without arguments list (file system, mount point); else mount, OSError if something is mounted there."""
    if fs is None:
        return list(_mounts)
    if any(point == mount_point for _, point in _mounts):
        raise OSError(1, "EPERM")
    _mounts.append((fs, mount_point))
    return None


def umount(which):
    """Unmount a file system or what is mounted at a point; OSError if there is none."""
    for entry in _mounts:
        if which in entry:
            _mounts.remove(entry)
            return
    raise OSError(22, "EINVAL")


class _Context:
    """What littlefs-python asks of a device.  It cannot pass on an exception, so _call() raises it afterwards."""

    def __init__(self, device):
        self._device = device
        self.error = None

    def _do(self, function, *args):
        try:
            result = function(*args)
        except Exception as e:  # PowerCut, too
            self.error = self.error or e
            return -_EIO
        return result if isinstance(result, int) and result < 0 else 0

    def read(self, cfg, block, off, size):
        buf = bytearray(size)
        # A failed read cannot be told: it is raised afterwards.
        self._do(self._device.readblocks, block, buf, off)
        return buf

    def prog(self, cfg, block, off, data):
        return self._do(self._device.writeblocks, block, bytearray(data), off)

    def erase(self, cfg, block):
        return self._do(self._device.ioctl, 6, block)

    def sync(self, cfg):
        return self._do(self._device.ioctl, 3, 0)


def _call(context, function, *args):
    """Call a function of littlefs, its errors as OSError, those of the device as they are."""
    context.error = None
    result = error = None
    try:
        result = function(*args)
    except LittleFSError as e:
        error = OSError(-e.code, e.name)
    if context.error is not None:
        raise context.error
    if error is not None:
        raise error
    return result


class VfsLfs2:
    """The file system on a block device, mounted at once; OSError if there is none."""

    def __init__(self, bdev, readsize=32, progsize=32, lookahead=32, mtime=True):
        self._context = _Context(bdev)
        self._config = _config(self._context, bdev, readsize, progsize, lookahead)
        self._lfs = lfs.LFSFilesystem()
        self._call(lfs.mount, self._config)

    @staticmethod
    def mkfs(bdev, readsize=32, progsize=32, lookahead=32):
        """Make an empty file system."""
        context = _Context(bdev)
        _call(context, lfs.format, lfs.LFSFilesystem(), _config(context, bdev, readsize, progsize, lookahead))

    def _call(self, function, *args):
        return _call(self._context, function, self._lfs, *args)

    def open(self, path, mode="r"):
        """Return a binary file; mode with "b"."""
        if "b" not in mode:
            raise NotImplementedError("text mode")
        flags = _FLAGS[mode[0]]
        if "+" in mode:
            flags |= lfs.LFSFileFlag.rdwr
        return _File(self, self._call(lfs.file_open, path, flags, _ENCODING))

    def ilistdir(self, path="/"):
        """Yield (name, type, 0, size) of what is in a directory."""
        directory = self._call(lfs.dir_open, path, _ENCODING)
        entries = []
        while True:
            info = self._call(lfs.dir_read, directory, _ENCODING)
            if info is None:
                break
            if info.name not in (".", ".."):
                entries.append((info.name, _DIR if info.type == 2 else _FILE, 0, info.size if info.type == 1 else 0))
        self._call(lfs.dir_close, directory)
        return iter(entries)

    def stat(self, path):
        """Return a tuple of ten, [0] the type and [6] the size."""
        info = self._call(lfs.stat, path, _ENCODING)
        return (_DIR if info.type == 2 else _FILE, 0, 0, 0, 0, 0, info.size if info.type == 1 else 0, 0, 0, 0)

    def statvfs(self, path):
        """Return a tuple of ten: [0], [1] the block size, [2] all blocks, [3], [4] the free ones."""
        size, count = self._config.block_size, self._config.block_count
        free = count - self._call(lfs.fs_size)
        return (size, size, count, free, free, 0, 0, 0, 0, 255)

    def mkdir(self, path):
        self._call(lfs.mkdir, path, _ENCODING)

    def remove(self, path):
        self._call(lfs.remove, path, _ENCODING)

    rmdir = remove

    def rename(self, old, new):
        self._call(lfs.rename, old, new, _ENCODING)

    def mount(self, readonly, mkfs):
        """It is mounted already."""

    def umount(self):
        """The device holds all there is."""
        self._call(lfs.unmount)


class _File:
    """An open file; it keeps its file system alive, as littlefs needs."""

    def __init__(self, fs, handle):
        self._fs = fs
        self._handle = handle

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def read(self, size=-1):
        if size < 0:
            size = self._fs._call(lfs.file_size, self._handle) - self._fs._call(lfs.file_tell, self._handle)
        return bytes(self._fs._call(lfs.file_read, self._handle, size))

    def write(self, data):
        return self._fs._call(lfs.file_write, self._handle, bytes(data))

    def seek(self, offset, whence=0):
        return self._fs._call(lfs.file_seek, self._handle, offset, whence)

    def tell(self):
        return self._fs._call(lfs.file_tell, self._handle)

    def flush(self):
        self._fs._call(lfs.file_sync, self._handle)

    def close(self):
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._fs._call(lfs.file_close, handle)


def _config(context, bdev, readsize, progsize, lookahead):
    # The values of vfs_lfsx.c.
    return lfs.LFSConfig(
        context=context,
        block_size=bdev.ioctl(5, 0),
        block_count=bdev.ioctl(4, 0),
        read_size=readsize,
        prog_size=progsize,
        cache_size=4 * max(readsize, progsize),
        lookahead_size=lookahead,
        block_cycles=100,
    )
