package main

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// The small files of a data directory: each is replaced as a whole.

// nextBoot counts this start, durably, before the first proposal carries it. A
// number that was used before would make the replay windows of all members take
// new batches for old ones.
func (d *diskStore) nextBoot() (uint64, error) {
	path := filepath.Join(d.dir, "boots")
	const hint = "write a number there that is larger than ever before, such as"
	var boots uint64
	switch b, err := os.ReadFile(path); {
	case err == nil:
		// Without a checksum: by an operator, or by version 0.1.0.
		text, err := unseal(b)
		if line, ok := strings.CutSuffix(string(b), "\n"); err != nil && ok {
			text, err = line, nil
		}
		if err == nil {
			boots, err = strconv.ParseUint(text, 10, 63) // it must not wrap
		}
		if err != nil {
			return 0, fmt.Errorf("%w: %s is damaged; %s %d", errRefuse, path, hint, time.Now().Unix())
		}
	case !errors.Is(err, fs.ErrNotExist):
		return 0, fmt.Errorf("%w: read %s: %w", errDurability, path, err)
	case d.exists():
		return 0, fmt.Errorf("%w: %s is missing; %s %d", errRefuse, path, hint, time.Now().Unix())
	}
	boots++
	if err := writeFileSync(path, seal(strconv.FormatUint(boots, 10))); err != nil {
		return 0, fmt.Errorf("%w: %w", errDurability, err)
	}
	return boots, nil
}

// seal adds a checksum to the one line of a small file; unseal takes it off.
func seal(line string) string {
	return fmt.Sprintf("%s %08x\n", line, crc32.Checksum([]byte(line), castagnoli))
}

func unseal(b []byte) (string, error) {
	if at := bytes.LastIndexByte(b, ' '); at >= 0 && seal(string(b[:at])) == string(b) {
		return string(b[:at]), nil
	}
	return "", errNotOurs
}

// markRemoved makes sure that a removed member never starts again from this
// directory (a removed id never comes back).
func (d *diskStore) markRemoved(reason string) error {
	return writeFileSync(filepath.Join(d.dir, "removed"), reason+"\n")
}

// writeFileSync replaces a small file so that a crash leaves the old or the new one.
func writeFileSync(path, content string) error {
	f, err := os.OpenFile(path+".tmp", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, werr := f.WriteString(content)
	if err := errors.Join(werr, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
