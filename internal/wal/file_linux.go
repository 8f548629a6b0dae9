package wal

import (
	"errors"
	"os"

	"golang.org/x/sys/unix"
)

// datasync is a sync without the file's times. A signal may interrupt it.
func datasync(f *os.File) error {
	for {
		if err := unix.Fdatasync(int(f.Fd())); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// forget drops the file's clean pages from memory.
func forget(f *os.File) error { return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) }

// allocate makes the file size bytes long, with its blocks, where the file system
// can: a full disk then shows at a new segment and not at a write.
func allocate(f *os.File, size int64) error {
	for {
		switch err := unix.Fallocate(int(f.Fd()), 0, 0, size); {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EOPNOTSUPP):
			return f.Truncate(size)
		default:
			return err
		}
	}
}

// writtenTo is where the part that was never written begins, at or after from.
// Where the file system cannot tell, all counts as written.
func writtenTo(f *os.File, from, size int64) int64 {
	at, err := unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE)
	if err != nil {
		return size
	}
	return at
}

// nextData is where the next part begins that was written, at or after from; size:
// there is none. Where the file system cannot tell, all counts as written.
func nextData(f *os.File, from, size int64) int64 {
	at, err := unix.Seek(int(f.Fd()), from, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size
	case err != nil:
		return from
	}
	return at
}
