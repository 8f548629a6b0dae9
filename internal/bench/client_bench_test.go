package bench

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// serverVariable makes the test binary a bare net/http server: in a process of
// its own, its processor time is not counted as the client's.
const serverVariable = "PONTOON_BENCH_TEST_SERVER"

func TestMain(m *testing.M) {
	if os.Getenv(serverVariable) != "" {
		if err := serveBare(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// serveBare answers every GET with 128 bytes and all else with 204, until its
// standard input ends. Its first line of output is its address.
func serveBare() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	value := bytes.Repeat([]byte("x"), 128)
	go func() {
		_ = http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			if r.Method != http.MethodGet {
				w.WriteHeader(http.StatusNoContent)
				return
			}
			_, _ = w.Write(value)
		}))
	}()
	fmt.Println(l.Addr())
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// bareServer starts it and returns its address.
func bareServer(b *testing.B) string {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), serverVariable+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// BenchmarkClient compares the client of this package with net/http's, tuned:
// cpu-µs/op is the processor time of this process alone.
func BenchmarkClient(b *testing.B) {
	const clients = 64
	endpoint := bareServer(b)
	value := bytes.Repeat([]byte("x"), 128)
	for _, method := range []string{http.MethodPut, http.MethodGet} {
		body := value
		if method == http.MethodGet {
			body = nil
		}
		run := func(name string, newClient func() func() error) {
			b.Run(method+"/"+name, func(b *testing.B) {
				var all [clients]func() error
				for i := range all {
					all[i] = newClient()
					if err := all[i](); err != nil {
						b.Fatal(err)
					}
				}
				var wg sync.WaitGroup
				b.ReportAllocs()
				b.ResetTimer()
				cpu := cpuTime()
				for i, do := range all {
					n := (b.N + clients - 1 - i) / clients
					wg.Go(func() {
						for range n {
							if err := do(); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				b.ReportMetric(micros(cpuTime()-cpu)/float64(b.N), "cpu-µs/op")
			})
		}
		run("own", func() func() error {
			c, err := dial(b.Context(), endpoint, 5*time.Second)
			if err != nil {
				b.Fatal(err)
			}
			head := method + " /v1/kv/bench/0000001234 HTTP/1.1\r\nHost: " + endpoint + "\r\n" + acceptLine
			if body != nil {
				head += "Content-Length: 128\r\n"
			}
			request := []byte(head + "\r\n")
			return func() error {
				_, err := c.do(request, body)
				return err
			}
		})
		transport := &http.Transport{MaxIdleConnsPerHost: clients, DisableCompression: true}
		defer transport.CloseIdleConnections()
		web := &http.Client{Transport: transport}
		run("net-http", func() func() error {
			return func() error {
				req, err := http.NewRequest(method, "http://"+endpoint+"/v1/kv/bench/0000001234", bytes.NewReader(body))
				if err != nil {
					return err
				}
				resp, err := web.Do(req)
				if err != nil {
					return err
				}
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				return err
			}
		})
	}
}
