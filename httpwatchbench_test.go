package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
)

// BenchmarkIdleWatches tells what a watch costs that waits: bytes of heap and
// stacks in all, and how much of that a connection costs whose handler merely
// waits, which is net/http's own. Then how long one write takes until all of
// them have it.
//
//	go test -run '^$' -bench IdleWatches -benchtime 1x .
func BenchmarkIdleWatches(b *testing.B) {
	watches := 10_000
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil {
		b.Fatal(err)
	}
	watches = min(watches, int(files.Cur)/2-100) // both ends are here
	leave := make(chan struct{})
	defer close(leave)
	for name, handler := range map[string]http.HandlerFunc{
		"nothing": func(w http.ResponseWriter, r *http.Request) {
			http.NewResponseController(w).Flush()
			select {
			case <-leave:
			case <-r.Context().Done():
			}
		}, "watch": nil, "watch-progress": nil,
	} {
		b.Run(name, func(b *testing.B) {
			h, twin := newTwinAPI(b, testLimits())
			query := "?key=k"
			if name == "watch-progress" {
				query += "&progress=1h"
			}
			var served http.Handler = h
			if handler != nil {
				served = handler
			}
			for b.Loop() {
				before := memoryInUse()
				conns := dialWatches(b, served, watches, query)
				b.ReportMetric(float64(memoryInUse()-before)/float64(watches), "bytes/watch")
				if handler == nil {
					start := time.Now()
					twin.do(put("k", "v"))
					var buf [256]byte
					for _, c := range conns {
						if _, err := io.ReadAtLeast(c, buf[:], 1); err != nil {
							b.Fatal(err)
						}
					}
					b.ReportMetric(time.Since(start).Seconds()*1000, "ms/change")
				}
				for _, c := range conns {
					c.Close()
				}
			}
		})
	}
}

// memoryInUse is heap and stacks. Stacks shrink during a collection, halving
// each time.
func memoryInUse() int64 {
	for range 4 {
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// dialWatches opens n streams and has read the header of each. A client's side
// is a socket, so that what is measured is the server's.
func dialWatches(b *testing.B, h http.Handler, n int, query string) []net.Conn {
	l, err := listenClient("127.0.0.1:0", "--listen-client", n)
	if err != nil {
		b.Fatal(err)
	}
	srv := newHTTPServer(h, zap.NewNop())
	go srv.Serve(l)
	b.Cleanup(func() { srv.Close() })
	conns := make([]net.Conn, n)
	var header [1024]byte
	for i := range conns {
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := fmt.Fprintf(c, "GET /v1/watch%s HTTP/1.1\r\nHost: h\r\n\r\n", query); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadAtLeast(c, header[:], 60); err != nil {
			b.Fatal(err)
		}
		conns[i] = c
	}
	return conns
}
