package main

import (
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// route is what a request asks for, and the only thing metrics and logs say
// about its path: a key never becomes a label.
type route uint8

const (
	routeOther    route = iota // a reserved name, an unknown path, a target that is no path
	routeKey                   // GET, HEAD, PUT /{key}
	routeMember                // POST, DELETE /{id}
	routeKV                    // /v1/kv/{key}
	routeRange                 // /v1/kv
	routeTxn                   // /v1/txn
	routeWatch                 // /v1/watch
	routeLeases                // /v1/leases
	routeLeaseID               // /v1/leases/{id}
	routeOpenAPI               // /v1/openapi.json
	routeMembers               // /v1/members
	routeMemberID              // /v1/members/{id}
	routePromote               // /v1/members/{id}/promote
	routeLeader                // /v1/leader
	routeStatus                // /v1/status
	routeLivez                 // /livez
	routeReadyz                // /readyz
	routeMetrics               // /metrics
	routeUnbuilt               // in the contract, not in this version
	routeCount
)

var routeNames = [routeCount]string{
	"other", "/{key}", "/{id}", "/v1/kv/{key}", "/v1/kv", "/v1/txn", "/v1/watch",
	"/v1/leases", "/v1/leases/{id}", "/v1/openapi.json", "/v1/members", "/v1/members/{id}",
	"/v1/members/{id}/promote", "/v1/leader", "/v1/status", "/livez", "/readyz", "/metrics", "unbuilt",
}

func (r route) String() string { return routeNames[r] }

var metricMethods = [...]string{"other", http.MethodGet, http.MethodHead, http.MethodPut, http.MethodPost, http.MethodDelete}

func methodIndex(method string) int {
	for i, m := range metricMethods {
		if m == method {
			return i
		}
	}
	return 0
}

// Statuses outside this range are counted under its nearer end.
const minStatus, maxStatus = 100, 599

// lazyChild resolves one labelled child at its first use: later uses cost one
// atomic load, and a pair that never occurs makes no time series.
type lazyChild[T any] struct {
	once  sync.Once
	child T
}

func (l *lazyChild[T]) get(resolve func() T) T {
	l.once.Do(func() { l.child = resolve() })
	return l.child
}

// httpMetrics counts what clients ask for. All of it may be used from any
// number of goroutines.
type httpMetrics struct {
	inFlight atomic.Int64 // requests that wait on the store; also the count behind limits.MaxInFlight

	watchers    atomic.Int64 // watches and long polls that are open
	watchEvents prometheus.Counter
	watchesCut  prometheus.Counter

	durations *prometheus.HistogramVec
	requests  *prometheus.CounterVec
	duration  [routeCount][len(metricMethods)]lazyChild[prometheus.Observer]
	request   [routeCount][maxStatus - minStatus + 1]lazyChild[prometheus.Counter]
}

// newHTTPMetrics registers the metrics of the client port. It panics if they
// are registered already, as prometheus.MustRegister does.
func newHTTPMetrics(reg prometheus.Registerer) *httpMetrics {
	m := &httpMetrics{
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "pontoon_http_request_duration_seconds",
			Help:    "Time from the request's header to its answer, by route and method; of a watch, to the answer's header.",
			Buckets: []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"route", "method"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "pontoon_http_requests_total",
			Help: "Requests answered, by route and status code; 499 where the client left first.",
		}, []string{"route", "code"}),
		watchEvents: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "pontoon_watch_events_total",
			Help: "Events sent to watches, each once for every watch that got it.",
		}),
		watchesCut: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "pontoon_watches_cut_total",
			Help: "Watches that were ended because they did not keep up, with what they need to go on.",
		}),
	}
	reg.MustRegister(m.durations, m.requests, m.watchEvents, m.watchesCut, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "pontoon_watchers",
		Help: "Watches and long polls that are being answered; if it stays below pontoon_watches, watchers leak.",
	}, func() float64 { return float64(m.watchers.Load()) }), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "pontoon_http_requests_in_flight",
		Help: "Requests that wait on the store; at its limit more are answered 429.",
	}, func() float64 { return float64(m.inFlight.Load()) }))
	return m
}

func (m *httpMetrics) observe(rt route, method string, status int, took time.Duration) {
	i := methodIndex(method)
	m.duration[rt][i].get(func() prometheus.Observer {
		return m.durations.WithLabelValues(rt.String(), metricMethods[i])
	}).Observe(took.Seconds())

	status = min(max(status, minStatus), maxStatus)
	m.request[rt][status-minStatus].get(func() prometheus.Counter {
		return m.requests.WithLabelValues(rt.String(), strconv.Itoa(status))
	}).Inc()
}
