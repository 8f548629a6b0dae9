package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"pontoon/internal/bench"
)

// version is what pontoon version and /v1/status say.
const version = "0.1.0"

func main() { os.Exit(start(os.Args[1:])) }

// start is main with a result: the exit code.
func start(args []string) int {
	switch {
	case len(args) > 0 && slices.Contains([]string{"version", "-version", "--version"}, args[0]):
		fmt.Println("pontoon", version, revision(), runtime.Version())
		return 0
	case len(args) > 0 && args[0] == "bench":
		ctx, cancel := signalContext()
		defer cancel()
		return bench.Main(ctx, args[1:], os.Stdout, os.Stderr)
	case len(args) > 0 && args[0] == "help":
		args = []string{"--help"}
	}
	cfg, err := parseConfig(args, os.Getenv, os.Stdout)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		fmt.Fprintln(os.Stderr, "pontoon:", strings.TrimPrefix(err.Error(), "usage: "))
		return 2
	}
	ctx, cancel := signalContext()
	defer cancel()
	return exitCode(serve(ctx, cfg))
}

// signalContext ends at the first signal, which stops gently; a second one
// stops at once.
func signalContext() (context.Context, context.CancelFunc) {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, cancel)
	return ctx, cancel
}

func serve(ctx context.Context, cfg Config) error {
	log := newLogger(cfg, os.Stderr)
	defer func() { _ = log.Sync() }() // a terminal cannot be synced
	gc := tuneGC(ctx, os.Getenv)
	s, err := newServer(ctx, cfg, log)
	if err != nil {
		return err
	}
	gc.serving()
	return s.run(ctx)
}

func exitCode(err error) int {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errRemoved) && !errors.Is(err, errDurability):
		return 0 // what was asked for; the log says so
	case errors.Is(err, context.Canceled):
		return 0
	}
	fmt.Fprintln(os.Stderr, "pontoon:", strings.ReplaceAll(strings.TrimPrefix(err.Error(), "usage: "), "\n", "; "))
	switch {
	case errors.Is(err, errUsage):
		return 2
	case errors.Is(err, errDurability):
		return 3
	}
	return 1
}

// newLogger writes for people on a terminal and JSON for machines, unless told.
func newLogger(cfg Config, out *os.File) *zap.Logger {
	console := cfg.LogFormat == "console"
	if info, err := out.Stat(); err == nil && cfg.LogFormat == "auto" {
		console = info.Mode()&os.ModeCharDevice != 0
	}
	enc := zap.NewProductionEncoderConfig()
	enc.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	e := zapcore.NewJSONEncoder(enc)
	if console {
		enc = zap.NewDevelopmentEncoderConfig()
		enc.EncodeTime = func(t time.Time, a zapcore.PrimitiveArrayEncoder) { a.AppendString(t.Format("15:04:05.000")) }
		enc.EncodeLevel = zapcore.CapitalLevelEncoder
		e = zapcore.NewConsoleEncoder(enc)
	}
	log := zap.New(zapcore.NewCore(e, zapcore.Lock(out), cfg.LogLevel))
	if !console {
		log = log.With(zap.Uint64("member", cfg.ID))
	}
	return log
}

// revision is the commit this binary was built from, if the build knew.
func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(no build information)"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return s.Value
		}
	}
	return info.Main.Version
}
