package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"pontoon/api"
)

// canned is a connection that answers with the given bytes and then ends; what
// is written to it vanishes.
type canned struct {
	net.Conn
	in *strings.Reader
}

func (c *canned) Read(p []byte) (int, error)    { return c.in.Read(p) }
func (c *canned) Write(p []byte) (int, error)   { return len(p), nil }
func (c *canned) Close() error                  { return nil }
func (c *canned) SetDeadline(t time.Time) error { return nil }

func cannedConn(in string) *conn {
	return newConn(context.Background(), &canned{in: strings.NewReader(in)}, time.Second)
}

var lawfulAnswers = []struct {
	name, text string
	status     int
	code       api.Code
	bytes      int64
	revision   int64
	closes     bool
}{
	{"length", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nKv-Revision: 42\r\n\r\nhello", 200, "", 5, 42, false},
	{"no body", "HTTP/1.1 204 No Content\r\nETag: \"7\"\r\nkv-revision: 7\r\n\r\n", 204, "", 0, 7, false},
	{"length 0", "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n", 201, "", 0, 0, false},
	{"304 with a length", "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304, "", 0, 0, false},
	{"no reason", "HTTP/1.1 204 \r\n\r\n", 204, "", 0, 0, false},
	{"nor a space", "HTTP/1.1 204\r\n\r\n", 204, "", 0, 0, false},
	{"chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nA;x=y\r\n0123456789\r\n0\r\n\r\n", 200, "", 13, 0, false},
	{"chunks and trailers", "HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n1\r\na\r\n0\r\nA: b\r\nC: d\r\n\r\n", 200, "", 1, 0, false},
	{"close", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi", 200, "", 2, 0, true},
	{"close among others", "HTTP/1.1 200 OK\r\nConnection: x, Close \r\nContent-Length: 0\r\n\r\n", 200, "", 0, 0, true},
	{"up to the end", "HTTP/1.1 200 OK\r\n\r\nall of it", 200, "", 9, 0, true},
	{"HTTP/1.0", "HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", 200, "", 1, 0, true},
	{"interim answers", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", 200, "", 1, 0, false},
	{"spaces", "HTTP/1.1 200 OK\r\nContent-Length:\t 1 \r\n\r\nx", 200, "", 1, 0, false},
	{"line feeds only", "HTTP/1.1 200 OK\nContent-Length: 1\n\nx", 200, "", 1, 0, false},
	{"the same length twice", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 200, "", 1, 0, false},
	{"problem", "HTTP/1.1 503 No\r\nContent-Length: 20\r\n\r\n{\"code\":\"no_leader\"}", 503, api.CodeNoLeader, 20, 0, false},
	{"problem in chunks", "HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{\"cod\r\nf\r\ne\":\"no_leader\"}\r\n0\r\n\r\n", 404, api.CodeNoLeader, 20, 0, false},
	{"problem as text", "HTTP/1.1 429 No\r\nContent-Length: 4\r\n\r\nbusy", 429, "", 4, 0, false},
	{"a long problem", "HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("x", 100_000), 500, "", 100_000, 0, false},
	{"a long value", "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + strings.Repeat("x", 1_000_000), 200, "", 1_000_000, 0, false},
}

// Each lawful answer is understood, up to its last byte: the next one follows on
// the same connection. net/http is the twin.
func TestAnswers(t *testing.T) {
	const next = "HTTP/1.1 204 No Content\r\nKv-Revision: 99\r\n\r\n"
	for _, tt := range lawfulAnswers {
		t.Run(tt.name, func(t *testing.T) {
			text := tt.text
			if !tt.closes {
				text += next
			}
			c := cannedConn(text)
			defer c.close()
			a, err := c.do([]byte("GET / HTTP/1.1\r\n\r\n"), nil)
			if want := (answer{tt.status, tt.code, tt.bytes, tt.revision}); err != nil || a != want || c.closes != tt.closes {
				t.Fatalf("%+v, closes %v, %v; want %+v, %v", a, c.closes, err, want, tt.closes)
			}
			if !tt.closes {
				if a, err := c.do(nil, nil); err != nil || a.revision != 99 {
					t.Errorf("the answer after it: %+v, %v", a, err)
				}
			}
			if tt.name == "interim answers" {
				return // http.ReadResponse stops at the first
			}
			resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(tt.text)), nil)
			if err != nil {
				t.Fatalf("net/http: %v", err)
			}
			body, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != a.status || int64(len(body)) != a.bytes {
				t.Errorf("net/http: status %d, %d bytes, %v", resp.StatusCode, len(body), err)
			}
		})
	}
}

// A body that is cut is an error at whatever byte it ends, and so is a head.
func TestAnswersCut(t *testing.T) {
	for _, tt := range lawfulAnswers {
		if len(tt.text) > 1000 {
			continue
		}
		for n := range len(tt.text) {
			if tt.name == "up to the end" && n >= strings.Index(tt.text, "\r\n\r\n")+4 {
				break
			}
			c := cannedConn(tt.text[:n])
			if a, err := c.do(nil, nil); err == nil {
				t.Errorf("%s, cut after %d bytes: %+v", tt.name, n, a)
			}
			c.close()
		}
	}
}

func TestAnswersMalformed(t *testing.T) {
	long := strings.Repeat("x", readBuffer)
	for _, text := range []string{
		"SSH-2.0-OpenSSH_9.2\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 20 OK\r\n\r\n", "HTTP/1.1 2x0 OK\r\n\r\n", "HTTP/1.1 2000 OK\r\n\r\n", "HTTP/1.1 099 OK\r\n\r\n", "HTTP/1.1  200\r\n\r\n", "HTTP/1.2 200 OK\r\n\r\n",
		"HTTP/1.1 101 Switching Protocols\r\n\r\n",
		"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "HTTP/1.1 200 OK\r\n: empty\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 1a\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nx\r\n", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n",
		"HTTP/1.1 200 OK\r\nX: " + long + "\r\n\r\n", long,
		"HTTP/1.1 200 OK\r\n" + strings.Repeat("X: y\r\n", maxHeadLines+1) + "\r\n",
		strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", maxHeadLines+1),
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + strings.Repeat("X: y\r\n", maxHeadLines+1) + "\r\n",
	} {
		c := cannedConn(text)
		if a, err := c.do(nil, nil); !errors.Is(err, errMalformed) {
			t.Errorf("%.80q: %+v, %v", text, a, err)
		}
		c.close()
	}
}

// Arbitrary bytes end in an answer or an error, and never in more bytes of a
// body than there were.
func FuzzAnswer(f *testing.F) {
	for _, tt := range lawfulAnswers {
		if len(tt.text) < 1000 {
			f.Add(tt.text)
		}
	}
	f.Fuzz(func(t *testing.T, text string) {
		c := cannedConn(text)
		defer c.close()
		a, err := c.do(nil, nil)
		if err == nil && (a.status < 200 || a.status > 999 || a.bytes < 0 || a.bytes > int64(len(text))) {
			t.Errorf("%q: %+v", text, a)
		}
	})
}

// A real server: requests one after the other on one connection, large values
// both ways, and a body that the server does not want.
func TestConnServer(t *testing.T) {
	var remote string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if remote == "" {
			remote = r.RemoteAddr
		} else if remote != r.RemoteAddr && r.URL.Path != "/new" {
			t.Errorf("%s comes on another connection", r.URL.Path)
		}
		switch r.URL.Path {
		case "/refuse":
			w.Header().Set("Connection", "close")
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			_, _ = io.WriteString(w, `{"code":"too_large"}`)
		case "/flush":
			for range 3 {
				_, _ = io.WriteString(w, "piece")
				_ = http.NewResponseController(w).Flush()
			}
		default:
			b, err := io.ReadAll(r.Body)
			if err != nil {
				t.Error(err)
			}
			_, _ = w.Write(b)
		}
	}))
	defer srv.Close()
	endpoint := strings.TrimPrefix(srv.URL, "http://")
	c, err := dial(t.Context(), endpoint, 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	head := func(method, path string, size int) []byte {
		return []byte(method + " " + path + " HTTP/1.1\r\nHost: x\r\nContent-Length: " + strconv.Itoa(size) + "\r\n\r\n")
	}
	for _, size := range []int{0, 1, 128, copiedBody, copiedBody + 1, 1 << 20, 3} {
		if a, err := c.do(head("PUT", "/echo", size), bytes.Repeat([]byte("x"), size)); err != nil || a.status != 200 || a.bytes != int64(size) {
			t.Fatalf("%d bytes: %+v, %v", size, a, err)
		}
	}
	if a, err := c.do(head("GET", "/flush", 0), nil); err != nil || a.bytes != 15 || c.closes {
		t.Errorf("chunks: %+v, %v", a, err)
	}
	// The connection may be reset before the answer is read, which is no error of
	// ours; hanging would be.
	if a, err := c.do(head("PUT", "/refuse", 8<<20), make([]byte, 8<<20)); err == nil && (a.status != 413 || a.code != api.CodeTooLarge || !c.closes) {
		t.Errorf("refused: %+v, closes %v", a, c.closes)
	}
}

// A server that is silent costs the timeout, and the end of the context ends a
// wait at once.
func TestConnEnds(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := dial(t.Context(), l.Addr().String(), 50*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if _, err := c.do([]byte("GET / HTTP/1.1\r\n\r\n"), nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a silent server: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if c, err = dial(ctx, l.Addr().String(), time.Hour); err != nil {
		t.Fatal(err)
	}
	defer c.close()
	go cancel()
	if _, err := c.do([]byte("GET / HTTP/1.1\r\n\r\n"), nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the end of the context: %v", err)
	}
}
