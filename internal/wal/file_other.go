//go:build !linux

package wal

import "os"

func datasync(f *os.File) error { return f.Sync() }

func allocate(f *os.File, size int64) error { return f.Truncate(size) }

func writtenTo(_ *os.File, _, size int64) int64 { return size }

// forget has no portable name.
func forget(*os.File) error { return nil }

func nextData(_ *os.File, from, _ int64) int64 { return from }
