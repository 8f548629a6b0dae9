package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// The bytes of the small files. A change of format has to go on reading these.
func TestSidecarGolden(t *testing.T) {
	dir := t.TempDir()
	d := openTestDir(t, dir)
	if _, err := d.nextBoot(); err != nil {
		t.Fatal(err)
	}
	if err := d.writeAside(&asideFile{Term: 7, Cluster: 0xfedcba9876543211, Member: 3, Number: 2, Moved: true}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"boots": "1 90f599e3\n",
		"aside": `{"term":7,"cluster_id":"18364758544493064721","member_id":"3","n":2,"moved":true} 2a26e7ea` + "\n",
	} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v; want %q", name, b, err, want)
		}
	}
	// What version 0.1.0 wrote, and what an operator writes who was told to.
	if err := os.WriteFile(filepath.Join(dir, "boots"), []byte("41\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if boot, err := d.nextBoot(); err != nil || boot != 42 {
		t.Errorf("start %d, %v", boot, err)
	}
}

// A disk that fails under a small file ends the start as one that fails under the
// log does, and names the file.
func TestSidecarDiskFails(t *testing.T) {
	for name, start := range map[string]func(*diskStore) error{
		"boots":     func(d *diskStore) error { _, err := d.nextBoot(); return err },
		"boots.tmp": func(d *diskStore) error { _, err := d.nextBoot(); return err },
		"synced":    func(d *diskStore) error { return d.openMark() },
	} {
		d := openTestDir(t, t.TempDir())
		// What opens, and cannot be read or written, as a file that the disk has lost.
		if err := os.Mkdir(filepath.Join(d.dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := start(d); !errors.Is(err, errDurability) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzUnseal(f *testing.F) {
	f.Add([]byte(seal("12")))
	f.Add([]byte(seal("")))
	f.Add([]byte("12\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if line, err := unseal(b); err == nil && seal(line) != string(b) {
			t.Errorf("%q is read as %q, which seals otherwise", b, line)
		}
	})
}
