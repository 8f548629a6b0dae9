package bench

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The operations.
const (
	opPut   = "put"
	opGet   = "get"
	opMixed = "mixed"
	opWatch = "watch"
)

// The consistencies of a read, as the query option has them.
const (
	linearizable = "linearizable"
	stale        = "stale"
)

// What one watcher watches.
const (
	scopePrefix = "prefix" // all keys of the run
	scopeKey    = "key"    // one of them
)

// Options is what a run was asked to do; in JSON, durations are seconds.
type Options struct {
	Endpoints    []string      `json:"endpoints"` // host:port, those in use
	Op           string        `json:"op"`
	Clients      int           `json:"clients"`
	Rate         float64       `json:"rate"` // requests per second in all; 0: closed loop
	Reads        float64       `json:"reads"`
	Consistency  string        `json:"consistency"`
	Keys         int           `json:"keys"`
	KeySize      int           `json:"key_size"`
	Prefix       string        `json:"prefix"`
	Distribution string        `json:"distribution"`
	ValueSize    int           `json:"value_size"`
	Fill         bool          `json:"fill"`
	Watchers     int           `json:"watchers"`
	Scope        string        `json:"scope"`
	Duration     time.Duration `json:"-"`
	Warmup       time.Duration `json:"-"`
	Timeout      time.Duration `json:"-"`
	Seed         uint64        `json:"seed"`
	JSON         bool          `json:"-"`
}

// Bounds of what can be asked for: each keeps a typing error from taking all
// memory of the machine.
const (
	maxEndpoints = 64
	maxClients   = 50_000
	maxRate      = 10_000_000
	maxKeys      = 1_000_000_000
	maxKeySize   = 4096     // the server's own
	maxValueSize = 16 << 20 // the server's own, with --max-value-bytes
	maxDuration  = 24 * time.Hour

	watchClients = 8   // the default of --clients where they are a watch's writers
	watchRate    = 100 // the default of --rate for them
)

func defaults() Options {
	return Options{
		Endpoints: []string{"127.0.0.1:9121"}, Op: opPut, Clients: 128, Reads: 0.9, Consistency: linearizable,
		Keys: 10_000, KeySize: 16, Prefix: "bench/", Distribution: uniform, ValueSize: 128, Watchers: 100, Scope: scopePrefix,
		Duration: 10 * time.Second, Warmup: time.Second, Timeout: 10 * time.Second,
	}
}

const usageText = `Measure a running Pontoon cluster.

Usage:
  pontoon bench [flags]

  pontoon bench --endpoints 127.0.0.1:12380,127.0.0.1:22380,127.0.0.1:32380 --op put --clients 128
  pontoon bench --op get --consistency stale
  pontoon bench --op mixed --reads 0.95 --distribution zipf --keys 100000
  pontoon bench --op put --rate 2000           2,000 requests/s, however long the answers take
  pontoon bench --op watch --watchers 1000     from before the PUT to the event

Without --rate each client sends its next request when the last one is answered.
With it, requests begin by a schedule and latency counts from there: what a user
would feel. A client is one connection with one request under way; clients are
spread over the endpoints. Keys stay behind: DELETE /v1/kv?prefix=bench/ removes them.

Ctrl-C ends a run early, with the result so far.
Exit codes: 0 something succeeded, 1 nothing did, 2 wrong flags.

Flags:
`

// parse reads the flags. flag.ErrHelp is returned after the help text went to out.
func parse(args []string, out io.Writer) (Options, error) {
	o := defaults()
	only := "all"
	fs := flagSet(&o, &only)
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(out, usageText)
		fs.SetOutput(out)
		fs.PrintDefaults()
		return o, err
	case err != nil:
		return o, err
	case fs.NArg() > 0:
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	return o, o.complete(given, only)
}

func flagSet(o *Options, only *string) *flag.FlagSet {
	fs := flag.NewFlagSet("pontoon bench", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Func("endpoints", "comma-separated `host:port` or URLs of the members (default "+o.Endpoints[0]+")", func(s string) (err error) {
		o.Endpoints, err = parseEndpoints(s)
		return err
	})
	fs.StringVar(only, "only", *only, "send to the `N`th of --endpoints only, or to all")
	fs.StringVar(&o.Op, "op", o.Op, "put, get, mixed or watch")
	fs.IntVar(&o.Clients, "clients", o.Clients, fmt.Sprintf("connections, each with one request under way; with --op watch they\nwrite, and the default is %d", watchClients))
	fs.Float64Var(&o.Rate, "rate", o.Rate, fmt.Sprintf("requests/s of all clients, by a schedule; 0: as fast as answers come\n(with --op watch the default is %d)", watchRate))
	fs.Float64Var(&o.Reads, "reads", o.Reads, "share of reads in --op mixed, 0 to 1")
	fs.StringVar(&o.Consistency, "consistency", o.Consistency, "of reads: linearizable or stale")
	fs.IntVar(&o.Keys, "keys", o.Keys, "how many keys there are")
	fs.IntVar(&o.KeySize, "key-size", o.KeySize, "bytes of a key, with its prefix")
	fs.StringVar(&o.Prefix, "prefix", o.Prefix, "what every key begins with")
	fs.StringVar(&o.Distribution, "distribution", o.Distribution, "of the keys: uniform, zipf (few are hot), sequential, or latest (reads\nprefer what was written last)")
	fs.IntVar(&o.ValueSize, "value-size", o.ValueSize, "bytes of a value")
	fs.BoolVar(&o.Fill, "fill", o.Fill, "write every key before the run (default true for get and mixed)")
	fs.IntVar(&o.Watchers, "watchers", o.Watchers, "open watches in --op watch")
	fs.StringVar(&o.Scope, "scope", o.Scope, "what a watcher watches: prefix (every key of the run) or key (one)")
	fs.DurationVar(&o.Duration, "duration", o.Duration, "how long to measure")
	fs.DurationVar(&o.Warmup, "warmup", o.Warmup, "how long to send before that")
	fs.DurationVar(&o.Timeout, "timeout", o.Timeout, "longest wait for one answer")
	fs.Uint64Var(&o.Seed, "seed", o.Seed, "of keys and values; 0: another one each time")
	fs.BoolVar(&o.JSON, "json", o.JSON, "print one JSON object instead of the table")
	return fs
}

// complete fills in what depends on other flags, then checks all of them.
func (o *Options) complete(given map[string]bool, only string) error {
	if o.Op == opWatch {
		if !given["clients"] {
			o.Clients = watchClients
		}
		if !given["rate"] {
			o.Rate = watchRate
		}
	}
	if !given["fill"] {
		o.Fill = o.Op == opGet || o.Op == opMixed
	}
	if o.Seed == 0 {
		var b [8]byte
		_, _ = rand.Read(b[:])                            // it never fails
		o.Seed = binary.LittleEndian.Uint64(b[:])>>11 | 1 // JSON readers keep 53 bits
	}
	if only != "all" {
		n, err := strconv.Atoi(only)
		if err != nil || n < 1 || n > len(o.Endpoints) {
			return fmt.Errorf("--only %q: give all, or the place of an endpoint, 1 to %d", only, len(o.Endpoints))
		}
		o.Endpoints = o.Endpoints[n-1 : n]
	}
	for _, word := range []struct {
		flag, got string
		want      []string
	}{
		{"op", o.Op, []string{opPut, opGet, opMixed, opWatch}},
		{"consistency", o.Consistency, []string{linearizable, stale}},
		{"distribution", o.Distribution, []string{uniform, zipf, sequential, latest}},
		{"scope", o.Scope, []string{scopePrefix, scopeKey}},
	} {
		if !slices.Contains(word.want, word.got) {
			return fmt.Errorf("--%s %q is none of %s", word.flag, word.got, strings.Join(word.want, ", "))
		}
	}
	smallest := len(o.Prefix) + digitsOf(max(o.Keys, 1))
	switch {
	case o.Clients < 1 || o.Clients > maxClients:
		return fmt.Errorf("--clients %d is outside 1 to %d", o.Clients, maxClients)
	case !(o.Rate >= 0 && o.Rate <= maxRate):
		return fmt.Errorf("--rate %v is outside 0 to %d", o.Rate, maxRate)
	case !(o.Reads >= 0 && o.Reads <= 1):
		return fmt.Errorf("--reads %v is outside 0 to 1", o.Reads)
	case o.Keys < 1 || o.Keys > maxKeys:
		return fmt.Errorf("--keys %d is outside 1 to %d", o.Keys, maxKeys)
	case o.KeySize < smallest || o.KeySize > maxKeySize:
		return fmt.Errorf("--key-size %d is outside %d (the prefix %q and the digits of %d keys) to %d", o.KeySize, smallest, o.Prefix, o.Keys, maxKeySize)
	case o.ValueSize < 0 || o.ValueSize > maxValueSize:
		return fmt.Errorf("--value-size %d is outside 0 to %d", o.ValueSize, maxValueSize)
	case o.Op == opWatch && o.ValueSize < stampSize:
		return fmt.Errorf("--value-size %d is too small for --op watch: %d bytes carry the time of the write", o.ValueSize, stampSize)
	case o.Watchers < 1 || o.Watchers > maxClients:
		return fmt.Errorf("--watchers %d is outside 1 to %d", o.Watchers, maxClients)
	case o.Duration < 10*time.Millisecond || o.Duration > maxDuration:
		return fmt.Errorf("--duration %v is outside 10ms to %v", o.Duration, maxDuration)
	case o.Warmup < 0 || o.Warmup > maxDuration:
		return fmt.Errorf("--warmup %v is outside 0 to %v", o.Warmup, maxDuration)
	case o.Timeout < 10*time.Millisecond || o.Timeout > time.Hour:
		return fmt.Errorf("--timeout %v is outside 10ms to 1h", o.Timeout)
	}
	return nil
}

// parseEndpoints takes host:port and http://host:port, with or without a
// slash at the end.
func parseEndpoints(s string) (list []string, err error) {
	for _, e := range strings.Split(s, ",") {
		host := strings.TrimSpace(e)
		if scheme, _, ok := strings.Cut(host, "://"); ok {
			u, err := url.Parse(host)
			switch {
			case err != nil:
				return nil, err
			case scheme != "http":
				return nil, fmt.Errorf("%q: only http:// is spoken", e)
			case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.User != nil:
				return nil, fmt.Errorf("%q: give only the host and the port", e)
			}
			if host = u.Host; u.Port() == "" {
				host = net.JoinHostPort(u.Hostname(), "80")
			}
		}
		name, port, err := net.SplitHostPort(host)
		if n, perr := strconv.Atoi(port); err != nil || perr != nil || n < 1 || n > 65535 {
			return nil, fmt.Errorf("%q is not host:port, such as 127.0.0.1:9121", e)
		}
		if name == "" || strings.ContainsAny(name, " /\r\n\t") {
			return nil, fmt.Errorf("%q names no host; write 127.0.0.1:%s for this machine", e, port)
		}
		if list = append(list, host); len(list) > maxEndpoints {
			return nil, fmt.Errorf("more than %d endpoints", maxEndpoints)
		}
	}
	return list, nil
}
