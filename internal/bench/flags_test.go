package bench

import (
	"errors"
	"flag"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestFlags(t *testing.T) {
	o, err := parse(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := defaults()
	if want.Seed = o.Seed; !reflect.DeepEqual(o, want) || o.Seed == 0 || o.Seed >= 1<<53 {
		t.Errorf("no flags: %+v", o)
	}
	for _, tt := range []struct {
		args  string
		check func(o Options) bool
	}{
		{"-op get -clients=3", func(o Options) bool { return o.Op == opGet && o.Clients == 3 && o.Fill }},
		{"--op mixed --fill=false", func(o Options) bool { return !o.Fill }},
		{"--op put --fill", func(o Options) bool { return o.Fill }},
		{"--op watch", func(o Options) bool { return o.Clients == watchClients && o.Rate == watchRate && !o.Fill }},
		{"--op watch --clients 2 --rate 0", func(o Options) bool { return o.Clients == 2 && o.Rate == 0 }},
		{"--endpoints a:1,http://b:2,http://c/,[::1]:4", func(o Options) bool {
			return reflect.DeepEqual(o.Endpoints, []string{"a:1", "b:2", "c:80", "[::1]:4"})
		}},
		{"--endpoints a:1,b:2 --only 2", func(o Options) bool { return reflect.DeepEqual(o.Endpoints, []string{"b:2"}) }},
		{"--only 1 --endpoints a:1,b:2", func(o Options) bool { return reflect.DeepEqual(o.Endpoints, []string{"a:1"}) }},
		{"--only all --endpoints a:1,b:2", func(o Options) bool { return len(o.Endpoints) == 2 }},
		{"--rate 0.5 --duration 90s --warmup 0s --seed 7", func(o Options) bool {
			return o.Rate == 0.5 && o.Duration == 90*time.Second && o.Warmup == 0 && o.Seed == 7
		}},
	} {
		if o, err := parse(strings.Fields(tt.args), nil); err != nil || !tt.check(o) {
			t.Errorf("%s: %+v, %v", tt.args, o, err)
		}
	}
}

// What cannot be is refused by name, with what could.
func TestFlagsRefused(t *testing.T) {
	for args, want := range map[string]string{
		"--op delete":                          "none of put, get, mixed, watch",
		"--op":                                 "-op",
		"--rates 5":                            "-rates",
		"put":                                  `"put"`,
		"--clients 0":                          "--clients",
		"--clients x":                          "clients",
		"--rate -1":                            "--rate",
		"--rate NaN":                           "--rate",
		"--reads 1.1":                          "--reads",
		"--keys 0":                             "--keys",
		"--key-size 9":                         "--key-size 9 is outside 10",
		"--value-size -1":                      "--value-size",
		"--op watch --value-size 23":           "--value-size 23 is too small",
		"--watchers 0":                         "--watchers",
		"--duration 1ms":                       "--duration",
		"--warmup -1s":                         "--warmup",
		"--timeout 0s":                         "--timeout",
		"--consistency weak":                   "linearizable, stale",
		"--distribution normal":                "uniform, zipf, sequential, latest",
		"--scope all":                          "prefix, key",
		"--only 2":                             "1 to 1",
		"--only 0":                             "--only",
		"--only x":                             "--only",
		"--endpoints localhost":                "host:port",
		"--endpoints :9121":                    "127.0.0.1:9121",
		"--endpoints a:1,":                     "host:port",
		"--endpoints a:0":                      "host:port",
		"--endpoints https://a:1":              "http://",
		"--endpoints http://a:1/v1":            "only the host and the port",
		"--endpoints http://u@a:1":             "only the host and the port",
		"--endpoints http://a:b":               "a:b",
		"--endpoints http:///x":                "",
		"--endpoints a" + "\r\n" + "x: y:9121": "",
	} {
		list := strings.SplitN(args, " ", 2)
		if !strings.Contains(args, "\r") {
			list = strings.Fields(args)
		}
		if _, err := parse(list, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want an error with %q", args, err, want)
		}
	}
}

func TestFlagsHelp(t *testing.T) {
	var b strings.Builder
	if _, err := parse([]string{"--help"}, &b); !errors.Is(err, flag.ErrHelp) {
		t.Fatal(err)
	}
	only := "all"
	o := defaults()
	flagSet(&o, &only).VisitAll(func(f *flag.Flag) {
		if !strings.Contains(b.String(), "\n  -"+f.Name) {
			t.Errorf("the help lacks --%s", f.Name)
		}
	})
}
