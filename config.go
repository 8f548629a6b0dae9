package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap/zapcore"
)

// Config is everything one node can be told. The zero value is not usable:
// start from defaultConfig. Durations are wall time, sizes are bytes.
type Config struct {
	ID           uint64       // this member; never 0, never reused after removal
	Cluster      []clusterURL // the peers, this node among them
	ClusterToken string       // tells apart clusters that were born with equal URLs
	Join         bool         // enter a running cluster instead of founding one

	Port            int    // client port
	ListenClient    string // host:port; empty: every interface, Port
	clientFlag      string // what ListenClient came from, to name it in errors
	ListenPeer      string // host:port; empty: that of this node's peer URL
	ListenDebug     string // host:port of net/http/pprof; empty: off
	AdvertiseClient string // URL shown in /v1/members; empty: none is shown
	DataDir         string // empty: pontoon-<id>

	TickInterval   time.Duration // one raft tick; a heartbeat is one tick
	ElectionTicks  int           // a follower campaigns after [n, 2n) silent ticks
	JoinTimeout    time.Duration // how long --join waits for POST /<id>
	DefaultTimeout time.Duration // a request without timeout=
	MaxTimeout     time.Duration // the most that timeout= may ask for

	SnapshotEntries uint64 // log entries between snapshots, at most
	SnapshotBytes   int64  // log bytes between snapshots, unless the state is larger
	CatchUpBytes    int64  // log kept in memory for slow followers, unless the state is larger (raftNode.compactTo)
	KeepSnapshots   int    // snapshot files kept, with the log from the oldest on

	MaxKeyBytes   int
	MaxValueBytes int64
	MaxInFlight   int   // client requests that wait for raft; more are answered 429
	MaxConns      int   // open client connections; more wait in the accept queue
	DiskReserve   int64 // free bytes below which writes are refused with 507

	LogLevel  zapcore.Level
	LogFormat string // auto, console or json
}

// Bounds that no flag moves. Each stands where a queue or a message could
// otherwise grow without end.
const (
	maxBatchBytes       = 1 << 20   // commands packed into one log entry; one larger command travels alone
	maxBatchCommands    = 4096      // the same, by count
	maxBatchesInFlight  = 256       // own batches not yet applied; far below kv.ReplayWindow
	maxForwardedBatches = 2         // the same on a follower, see mayHaveInFlight
	maxUncommitted      = 64 << 20  // proposals raft holds before it drops new ones
	maxMessageBytes     = 4 << 20   // entries in one append message
	maxInflightAppends  = 256       // append messages on the way to one follower
	maxLogBytesHeld     = 1 << 30   // log kept in memory while a snapshot travels
	proposeQueue        = 4096      // capacity of proposeC; proposers beyond it wait until their deadline
	recvQueue           = 4096      // capacity of recvC; peers' messages beyond it are dropped and counted
	maxReceived         = 256 << 20 // bytes of messages in recvC; the same
	maxOffered          = 256 << 20 // bytes of commands in proposeC; more are answered 429
	commitQueue         = 64        // capacity of commitC; the raft loop waits beyond it
	maxHeldProposals    = 1024      // forwarded proposals parked while leadership moves
	maxWatches          = 1 << 14   // open watches; more are answered 429
	maxExports          = 8         // exports under way, each holds a clone of the state; more are answered 429
	maxUndoing          = 4         // reads of an older revision at once; more wait until their deadline
	maxTxnBytes         = 4 << 20   // body of a transaction
	maxBodyBytes        = 256 << 20 // bodies of clients, on their way in or waiting for raft; more are answered 429
	maxAnswerBytes      = 256 << 20 // large answers on their way to clients; more are answered 429
	maxPeerConns        = 256       // connections of peers, who need ten each; more wait to be accepted
	minDiskReserve      = 128 << 20 // a segment of the log, and what else is written until the free space is looked at again
	promoteLag          = 32        // a learner this many entries behind the commit is caught up
)

// clusterURL is one entry of --cluster: the id is the position in the list,
// from 1, unless it is written out as ID=URL.
type clusterURL struct {
	ID  uint64
	URL string
}

func defaultConfig() Config {
	return Config{
		ID:              1,
		Cluster:         []clusterURL{{1, "http://127.0.0.1:9021"}},
		ClusterToken:    "pontoon",
		Port:            9121,
		TickInterval:    100 * time.Millisecond,
		ElectionTicks:   5,
		JoinTimeout:     time.Minute,
		DefaultTimeout:  5 * time.Second,
		MaxTimeout:      60 * time.Second,
		SnapshotEntries: 100_000,
		SnapshotBytes:   64 << 20,
		CatchUpBytes:    16 << 20,
		KeepSnapshots:   2,
		MaxKeyBytes:     4096,
		MaxValueBytes:   1 << 20,
		MaxInFlight:     8192,
		MaxConns:        16384,
		DiskReserve:     256 << 20,
		LogLevel:        zapcore.InfoLevel,
		LogFormat:       "auto",
	}
}

const usageText = `Pontoon: a replicated key-value store you can curl.

Usage:
  pontoon [flags]      run a node
  pontoon bench        measure a running cluster (pontoon bench --help)
  pontoon version      print the version
  pontoon help         print this text

Start one node, then talk to it:
  pontoon
  curl -X PUT -d hello http://127.0.0.1:9121/my-key
  curl http://127.0.0.1:9121/my-key

Three nodes (give each its own --id and --port, all the same --cluster):
  pontoon --id 1 --cluster http://10.0.0.1:12379,http://10.0.0.2:12379,http://10.0.0.3:12379 --port 12380

A fourth: tell the cluster, then start it.
  curl -X POST -d http://10.0.0.4:12379 http://10.0.0.1:12380/4
  pontoon --id 4 --join --port 12380 --cluster http://10.0.0.1:12379,http://10.0.0.2:12379,http://10.0.0.3:12379,http://10.0.0.4:12379

Every flag may be written with one dash or two, and given as an environment
variable instead: --data-dir is PONTOON_DATA_DIR. A flag wins over its variable.

Exit codes: 0 stopped or removed from the cluster, 1 could not start or run,
2 wrong flags, 3 the disk failed: nothing was acknowledged after that.

Flags:
`

// errUsage marks what the user typed wrong: exit code 2.
var errUsage = errors.New("usage")

// parseConfig reads the environment, then args (without the program name).
// flag.ErrHelp is returned after the help text went to out.
func parseConfig(args []string, getenv func(string) string, out io.Writer) (Config, error) {
	c := defaultConfig()
	fs := flag.NewFlagSet("pontoon", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Var(decimal[uint64]{&c.ID}, "id", "this node's `id`: its place in --cluster, from 1")
	fs.Func("cluster", "comma-separated peer URLs; the first is node 1, or write `ID=URL`\n(default "+c.Cluster[0].URL+")", func(s string) (err error) {
		c.Cluster, err = parseCluster(s)
		return err
	})
	fs.StringVar(&c.ClusterToken, "cluster-token", c.ClusterToken, "a word that all members of a new cluster share; keeps two clusters apart")
	fs.BoolVar(&c.Join, "join", c.Join, "join a running cluster (after POST /<id> to one of its members)")
	fs.DurationVar(&c.JoinTimeout, "join-timeout", c.JoinTimeout, "how long --join waits to be let in")
	fs.Var(decimal[int]{&c.Port}, "port", "client `port`")
	fs.StringVar(&c.ListenClient, "listen-client", "", "`host:port` to serve clients on (default every interface, --port)")
	fs.StringVar(&c.ListenPeer, "listen-peer", "", "`host:port` to serve peers on (default that of this node's URL in --cluster)")
	fs.StringVar(&c.ListenDebug, "listen-debug", "", "`host:port` to serve Go's profiles on, for whoever may see everything (default off)")
	fs.StringVar(&c.AdvertiseClient, "advertise-client", "", "client `URL` to show in /v1/members")
	fs.StringVar(&c.DataDir, "data-dir", "", "`directory` of the log and snapshots (default pontoon-<id>)")
	fs.DurationVar(&c.TickInterval, "heartbeat", c.TickInterval, "time between a leader's heartbeats")
	fs.Var(decimal[int]{&c.ElectionTicks}, "election-ticks", "`n` silent heartbeats before an election; the draw is between n and 2n")
	fs.DurationVar(&c.DefaultTimeout, "request-timeout", c.DefaultTimeout, "deadline of a request that names none")
	fs.DurationVar(&c.MaxTimeout, "max-request-timeout", c.MaxTimeout, "the longest deadline that a request may name")
	fs.Var(decimal[uint64]{&c.SnapshotEntries}, "snapshot-entries", "`n` log entries between snapshots, at most")
	fs.Var((*byteSize)(&c.SnapshotBytes), "snapshot-bytes", "log `size` between snapshots (or the size of the state, if that is larger)")
	fs.Var((*byteSize)(&c.CatchUpBytes), "catch-up-bytes", "log `size` kept in memory, for followers that lag (or an eighth of the state, if that is larger)")
	fs.Var(decimal[int]{&c.KeepSnapshots}, "keep-snapshots", "`n` snapshot files to keep, with the log from the oldest on; at least 2")
	fs.Var((*byteSize)(&c.MaxValueBytes), "max-value-bytes", "largest value `size`; larger ones get 413")
	fs.Var(decimal[int]{&c.MaxInFlight}, "max-in-flight", "`n` client requests that may wait at once; more get 429")
	fs.Var(decimal[int]{&c.MaxConns}, "max-connections", "`n` open client connections; more wait to be accepted")
	fs.Var((*byteSize)(&c.DiskReserve), "disk-reserve", "free disk `size` below which writes get 507; at least 128MiB, or 0 for never")
	fs.TextVar(&c.LogLevel, "log-level", c.LogLevel, "debug, info, warn or error")
	fs.StringVar(&c.LogFormat, "log-format", c.LogFormat, "auto (a terminal gets console), console or json")

	usage := func(w io.Writer) {
		fmt.Fprint(w, usageText)
		fs.SetOutput(w)
		fs.PrintDefaults()
		fs.SetOutput(io.Discard)
	}
	var envErr error
	fs.VisitAll(func(f *flag.Flag) {
		name := "PONTOON_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		if v := getenv(name); v != "" && envErr == nil {
			if err := fs.Set(f.Name, v); err != nil {
				envErr = fmt.Errorf("%w: %s=%q: %v", errUsage, name, v, err)
			}
		}
	})
	if envErr != nil {
		return c, envErr
	}
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		usage(out)
		return c, err
	case err != nil:
		return c, fmt.Errorf("%w: %v (try pontoon help)", errUsage, err)
	case fs.NArg() > 0:
		return c, fmt.Errorf("%w: unexpected argument %q (try pontoon help)", errUsage, fs.Arg(0))
	}
	return c, c.complete()
}

// complete fills in what depends on other fields, then checks all of it.
func (c *Config) complete() error {
	fail := func(format string, a ...any) error {
		return fmt.Errorf("%w: %s", errUsage, fmt.Sprintf(format, a...))
	}
	minReserve := byteSize(minDiskReserve)
	own := slices.IndexFunc(c.Cluster, func(m clusterURL) bool { return m.ID == c.ID })
	switch {
	case c.ID == 0:
		return fail("--id must be at least 1")
	case own < 0:
		return fail("--id %d is not in --cluster, which lists %s; add this node's own URL there", c.ID, describeCluster(c.Cluster))
	case c.Port < 0 || c.Port > 65535:
		return fail("--port %d is not a TCP port", c.Port)
	case c.TickInterval < 10*time.Millisecond || c.TickInterval > 10*time.Second:
		return fail("--heartbeat %v is outside 10ms to 10s", c.TickInterval)
	case c.ElectionTicks < 3 || c.ElectionTicks > 100:
		return fail("--election-ticks %d is outside 3 to 100", c.ElectionTicks)
	case c.SnapshotEntries < 1, c.SnapshotBytes < 1:
		return fail("--snapshot-entries and --snapshot-bytes must be at least 1")
	case c.KeepSnapshots < 2:
		return fail("--keep-snapshots must be at least 2: a damaged newest one must have a predecessor")
	case c.MaxValueBytes < 1 || c.MaxValueBytes > 16<<20:
		return fail("--max-value-bytes must be between 1 and 16MiB")
	case c.CatchUpBytes < 0, c.DiskReserve < 0:
		return fail("--catch-up-bytes and --disk-reserve must not be negative")
	case c.DiskReserve > 0 && c.DiskReserve < minDiskReserve:
		return fail("--disk-reserve %v protects nothing: the log takes %v at once; give it %v or more, or 0 to refuse no writes",
			(*byteSize)(&c.DiskReserve), (*byteSize)(&segmentBytes), &minReserve)
	case c.MaxInFlight < 1, c.MaxConns < 1:
		return fail("--max-in-flight and --max-connections must be at least 1")
	case c.DefaultTimeout <= 0 || c.MaxTimeout < c.DefaultTimeout:
		return fail("--request-timeout must be positive and at most --max-request-timeout")
	case c.LogLevel < zapcore.DebugLevel || c.LogLevel > zapcore.ErrorLevel: // zap knows more
		return fail("--log-level %v is none of debug, info, warn, error", c.LogLevel)
	case !slices.Contains([]string{"auto", "console", "json"}, c.LogFormat):
		return fail("--log-format %q is none of auto, console, json", c.LogFormat)
	}
	c.clientFlag = "--listen-client"
	if c.ListenClient == "" {
		c.clientFlag = "--port"
		c.ListenClient = ":" + strconv.Itoa(c.Port)
	}
	if c.ListenPeer == "" {
		u, err := url.Parse(c.Cluster[own].URL)
		if err != nil {
			return fail("--cluster: %v", err)
		}
		c.ListenPeer = u.Host
	}
	for name, addr := range map[string]string{"--listen-client": c.ListenClient, "--listen-peer": c.ListenPeer, "--listen-debug": c.ListenDebug} {
		if name == "--listen-debug" && addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(addr); err != nil {
			return fail("%s %q is not host:port", name, addr)
		}
	}
	if c.AdvertiseClient != "" {
		if _, err := parseHTTPURL(c.AdvertiseClient); err != nil {
			return fail("--advertise-client: %v", err)
		}
	}
	if c.DataDir == "" {
		c.DataDir = "pontoon-" + strconv.FormatUint(c.ID, 10)
	}
	return nil
}

// peerURL is this node's own URL as --cluster has it.
func (c *Config) peerURL() string {
	for _, m := range c.Cluster {
		if m.ID == c.ID {
			return m.URL
		}
	}
	return ""
}

// otherURLs are those of the other nodes in --cluster.
func (c *Config) otherURLs() (urls []string) {
	for _, m := range c.Cluster {
		if m.ID != c.ID {
			urls = append(urls, m.URL)
		}
	}
	return urls
}

// electionTimeout is the longest silence after which a healthy follower campaigns.
func (c *Config) electionTimeout() time.Duration {
	return time.Duration(2*c.ElectionTicks) * c.TickInterval
}

var idPrefix = regexp.MustCompile(`^([1-9][0-9]*)=`)

// parseCluster reads "URL,URL" or "ID=URL,ID=URL". URLs and ids must be unique.
func parseCluster(s string) ([]clusterURL, error) {
	var out []clusterURL
	for i, part := range strings.Split(s, ",") {
		m := clusterURL{ID: uint64(i + 1), URL: strings.TrimSpace(part)}
		if g := idPrefix.FindStringSubmatch(m.URL); g != nil {
			id, err := parseID(g[1])
			if err != nil {
				return nil, fmt.Errorf("entry %d: %v", i+1, err)
			}
			m.ID, m.URL = id, m.URL[len(g[0]):]
		}
		u, err := parseHTTPURL(m.URL)
		if err != nil {
			return nil, fmt.Errorf("entry %d: %v", i+1, err)
		}
		m.URL = u
		for _, o := range out {
			if o.ID == m.ID || o.URL == m.URL {
				return nil, fmt.Errorf("entry %d: %s is listed twice", i+1, part)
			}
		}
		out = append(out, m)
	}
	return out, nil
}

// parseHTTPURL accepts http://host:port and returns it in one spelling, so that
// equal addresses compare equal.
func parseHTTPURL(s string) (string, error) {
	host, port, err := splitHTTPURL(s)
	if err != nil {
		return "", err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return "", fmt.Errorf("%q has no valid port", s)
	}
	return fmt.Sprintf("http://%s:%d", host, n), nil
}

// splitHTTPURL returns the host as a URL has it, and the port as it was written.
func splitHTTPURL(s string) (host, port string, err error) {
	u, err := url.Parse(s)
	if err != nil {
		return "", "", fmt.Errorf("%q is not a URL", s)
	}
	host, port, err = net.SplitHostPort(u.Host)
	switch {
	case u.Scheme != "http":
		return "", "", fmt.Errorf("%q must start with http://", s)
	case err != nil || host == "" || port == "":
		return "", "", fmt.Errorf("%q must name host:port", s)
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil:
		return "", "", fmt.Errorf("%q must be http://host:port and nothing more", s)
	}
	return strings.ToLower(strings.TrimSuffix(u.Host, ":"+port)), port, nil
}

// parseID reads a member id: decimal, no leading zero, and not one of the two
// largest numbers, which raft keeps for its local storage threads.
func parseID(s string) (uint64, error) {
	id, err := strconv.ParseUint(s, 10, 64)
	if err != nil || s[0] == '0' || s[0] == '+' || id >= 1<<64-2 {
		return 0, fmt.Errorf("%q is not a member id (1 or more, decimal, no leading zero)", s)
	}
	return id, nil
}

func describeCluster(c []clusterURL) string {
	var b []string
	for _, m := range c {
		b = append(b, fmt.Sprintf("%d (%s)", m.ID, m.URL))
	}
	return strings.Join(b, ", ")
}

// decimal is a flag value: a number in one spelling. Go's own would take 010 for 8.
type decimal[T int | uint64] struct{ to *T }

func (d decimal[T]) String() string {
	if d.to == nil { // package flag asks for that of a zero value
		return "0"
	}
	return fmt.Sprint(*d.to)
}

func (d decimal[T]) Set(s string) error {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || strconv.FormatUint(n, 10) != s || T(n) < 0 {
		return fmt.Errorf("want a decimal number without leading zeros")
	}
	*d.to = T(n)
	return nil
}

// byteSize is a flag value: a number with an optional KiB, MiB or GiB.
type byteSize int64

func (b *byteSize) String() string {
	n := int64(*b)
	for _, u := range []struct {
		size int64
		name string
	}{{1 << 30, "GiB"}, {1 << 20, "MiB"}, {1 << 10, "KiB"}} {
		if n != 0 && n%u.size == 0 {
			return strconv.FormatInt(n/u.size, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

func (b *byteSize) Set(s string) error {
	unit := int64(1)
	for name, u := range map[string]int64{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30} {
		if rest, ok := strings.CutSuffix(s, name); ok {
			s, unit = rest, u
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 || n > (1<<62)/unit {
		return fmt.Errorf("want a size such as 65536, 512KiB or 64MiB")
	}
	*b = byteSize(n * unit)
	return nil
}
