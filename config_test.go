package main

import (
	"errors"
	"io"
	"strings"
	"testing"
)

func parseTestConfig(args ...string) (Config, error) {
	return parseConfig(args, func(string) string { return "" }, io.Discard)
}

func TestConfigNumbers(t *testing.T) {
	c, err := parseTestConfig("--id", "18446744073709551613", "--cluster", "18446744073709551613=http://127.0.0.1:1", "--port", "0", "--max-connections", "9223372036854775807")
	if err != nil || c.ID != 1<<64-3 || c.Port != 0 || c.MaxConns != 1<<63-1 {
		t.Errorf("got %+v, %v", c, err)
	}
	for _, args := range [][]string{
		{"--id", "010", "--cluster", "8=http://127.0.0.1:1"}, // Go's own spelling of 8
		{"--id", "010", "--cluster", "10=http://127.0.0.1:1"},
		{"--id", "0x1"}, {"--id", "+1"}, {"--id", "1_0"}, {"--id", ""}, {"--id", "18446744073709551616"},
		{"--port", "09121"}, {"--port", "-1"}, {"--max-connections", "9223372036854775808"},
	} {
		if _, err := parseTestConfig(args...); !errors.Is(err, errUsage) || !strings.Contains(err.Error(), "decimal") {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestConfigDiskReserve(t *testing.T) {
	for size, want := range map[string]int64{"0": 0, "128MiB": 128 << 20, "1GiB": 1 << 30} {
		if c, err := parseTestConfig("--disk-reserve", size); err != nil || c.DiskReserve != want {
			t.Errorf("%s: %d, %v", size, c.DiskReserve, err)
		}
	}
	for _, size := range []string{"1", "5MiB", "134217727"} {
		if _, err := parseTestConfig("--disk-reserve", size); !errors.Is(err, errUsage) || !strings.Contains(err.Error(), "128MiB or more") {
			t.Errorf("%s: %v", size, err)
		}
	}
}

func TestConfigLogLevel(t *testing.T) {
	for _, level := range []string{"debug", "info", "warn", "error"} {
		if c, err := parseTestConfig("--log-level", level); err != nil || c.LogLevel.String() != level {
			t.Errorf("%s: %v, %v", level, c.LogLevel, err)
		}
	}
	for _, level := range []string{"dpanic", "panic", "fatal", "trace"} {
		if _, err := parseTestConfig("--log-level", level); !errors.Is(err, errUsage) {
			t.Errorf("%s: %v", level, err)
		}
	}
}

func TestConfigURLs(t *testing.T) {
	for s, want := range map[string]string{
		"http://127.0.0.1:046310": "http://127.0.0.1:46310",
		"http://LocalHost:80/":    "http://localhost:80",
		"http://[::1]:0080":       "http://[::1]:80",
		"http://127.0.0.1:65535":  "http://127.0.0.1:65535",
		"http://127.0.0.1:65536":  "",
		"http://127.0.0.1:000":    "",
		"http://127.0.0.1":        "",
		"http://:80":              "",
		"http://a:80/x":           "",
	} {
		if got, err := parseHTTPURL(s); got != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v; want %q", s, got, err, want)
		}
	}
	if c, err := parseCluster("http://127.0.0.1:46310,http://127.0.0.1:046310"); err == nil {
		t.Errorf("one address twice: %v", c)
	}
	// What an older version let into a table stays: members may not differ over it.
	if err := checkPeerURLs([]string{"http://127.0.0.1:046310"}); err != nil {
		t.Errorf("an old table: %v", err)
	}
	if err := checkPeerURLs([]string{"http://LocalHost:80"}); err == nil || !strings.Contains(err.Error(), "http://localhost:80") {
		t.Errorf("not as the table has it: %v", err)
	}
}
