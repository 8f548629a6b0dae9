package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

var (
	runMutants = flag.Bool("mutants", false, "TestMutants: build each mutant and see it die (some 10 minutes); make mutants")
	oneMutant  = flag.String("mutant", "", "with -mutants: only those whose name matches this pattern")
)

// mutant is a bug that could have been written, and the test that must find it.
// A line of code that no mutant of this list breaks may still be wrong; one that does,
// and that nothing notices, is a rule without a test.
type mutant struct {
	name          string // what it breaks, as a user would see it
	file          string
	before, after string // before occurs once in file
	test          string // -run pattern
	in            string // package of the test; empty: that of file
}

// TestMutants holds that each mutant is still about a line that is there. With
// -mutants it also builds them, one after the other, and each has to die.
func TestMutants(t *testing.T) {
	if len(mutants) < 25 {
		t.Errorf("only %d mutants", len(mutants))
	}
	only, err := regexp.Compile(*oneMutant)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mutants {
		b, err := os.ReadFile(m.file)
		if err != nil {
			t.Fatal(err)
		}
		if n := bytes.Count(b, []byte(m.before)); n != 1 || m.before == m.after {
			t.Errorf("%s: %s has it %d times:\n%s", m.name, m.file, n, m.before)
			continue
		}
		if *runMutants && only.MatchString(m.name) {
			start := time.Now()
			killer, err := m.run(t, bytes.Replace(b, []byte(m.before), []byte(m.after), 1))
			took := time.Since(start).Round(100 * time.Millisecond)
			if err != nil {
				t.Errorf("ALIVE  %-60s %v: %v", m.name, took, err)
			} else {
				t.Logf("killed %-60s %6v  %s", m.name, took, killer)
			}
		}
	}
}

// run builds the mutant beside the sources, by an overlay, and returns the test that
// failed.
func (m *mutant) run(t *testing.T, source []byte) (killer string, err error) {
	dir := t.TempDir()
	abs, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	broken := filepath.Join(dir, filepath.Base(m.file))
	overlay, err := json.Marshal(map[string]any{"Replace": map[string]string{abs: broken}})
	if err != nil {
		return "", err
	}
	if err := errors.Join(os.WriteFile(broken, source, 0o600), os.WriteFile(filepath.Join(dir, "overlay.json"), overlay, 0o600)); err != nil {
		return "", err
	}
	pkg := cmp.Or(m.in, "./"+filepath.Dir(m.file))
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-timeout=3m", "-run", m.test, pkg, "-rapid.nofailfile")
	cmd.Env = append(os.Environ(), "GOFLAGS=-overlay="+filepath.Join(dir, "overlay.json")) // also for the program that process tests build
	out, err := cmd.CombinedOutput()
	switch failed := regexp.MustCompile(`(?m)^--- FAIL: (\S+)|^(panic: .*)`).FindSubmatch(out); {
	case err == nil && bytes.Contains(out, []byte("no tests to run")):
		return "", fmt.Errorf("no test matches %s", m.test)
	case err == nil:
		return "", fmt.Errorf("%s passes", m.test)
	case failed == nil:
		return "", fmt.Errorf("it fails without a test that does: %.2000s", out)
	default:
		return strings.TrimSpace(string(slices.Concat(failed[1], failed[2]))), nil
	}
}
