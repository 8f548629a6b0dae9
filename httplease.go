package main

import (
	"context"
	"net/http"
	"strconv"
	"time"
	"unicode/utf8"

	"pontoon/api"
	"pontoon/kv"
)

// serveLeases answers /v1/leases and /v1/leases/{id}.
func (c *apiCall) serveLeases(arg string) error {
	method := c.r.Method
	if c.route == routeLeases {
		if method != http.MethodPost {
			return badMethod(c.route)
		}
		return c.grantLease()
	}
	var call func(id int64) error
	switch method {
	case http.MethodGet, http.MethodHead:
		call = c.getLease
	case http.MethodPut:
		call = c.keepLeaseAlive
	case http.MethodDelete:
		call = c.revokeLease
	default:
		return badMethod(c.route)
	}
	id, ok := parseLeaseID(arg)
	if !ok {
		return &httpRefusal{err: errBadRequest, detail: quoteShort(arg) + " is no lease id",
			hint: "an id is a decimal number without leading zeros, as POST /v1/leases answers it"}
	}
	return call(id)
}

// parseLeaseID takes `[1-9][0-9]*` up to 63 bits.
func parseLeaseID(s string) (int64, bool) {
	return parseNumber(s, 1, 1<<63-1)
}

func (c *apiCall) grantLease() error {
	if err := c.parseOptions(optIdempotency); err != nil {
		return err
	}
	body, err := c.smallBody(maxJSONBytes)
	if err != nil {
		return err
	}
	ttl, err := decodeLease(body)
	if err != nil {
		return err
	}
	if ttl == 0 {
		return &httpRefusal{err: errBadRequest, detail: "the body: lacks the field ttl", hint: `send how long the lease lives, such as {"ttl":"30s"}`}
	}
	res, err := c.proposeInSlot(kv.Command{Op: kv.OpGrant, TTL: ttl, Once: c.once(body)})
	if err != nil {
		return err
	}
	c.w.Header()["Location"] = []string{"/v1/leases/" + strconv.FormatInt(res.Lease.ID, 10)}
	return c.writeJSON(http.StatusCreated, apiLease(&leaseInfo{Lease: *res.Lease, remaining: res.Lease.TTL}))
}

func (c *apiCall) getLease(id int64) error {
	if err := c.parseOptions(optRead); err != nil {
		return err
	}
	var info leaseInfo
	err := c.waiting(func(ctx context.Context) (err error) {
		info, err = c.api.b.lease(ctx, id, c.read)
		return err
	})
	if err == nil {
		err = c.holdAnswer(keysBytes(info.keys), false)
	}
	if err != nil {
		return err
	}
	return c.writeJSON(http.StatusOK, apiLease(&info))
}

// keysBytes is about what the names of keys take as JSON.
func keysBytes(keys []string) (n int64) {
	for _, key := range keys {
		n += 2 * int64(len(key))
	}
	return n
}

// keepLeaseAlive answers with the lease as the keep-alive left it. The names of
// its keys are no part of the command's result; they are those of the moment, and
// left out where large answers have no room: a lease has to be kept alive then, too.
func (c *apiCall) keepLeaseAlive(id int64) error {
	if err := c.parseOptions(optIdempotency); err != nil {
		return err
	}
	body, err := c.smallBody(maxJSONBytes)
	if err != nil {
		return err
	}
	var ttl time.Duration // 0: that of the lease
	if len(body) > 0 {
		if ttl, err = decodeLease(body); err != nil {
			return err
		}
	}
	res, err := c.proposeInSlot(kv.Command{Op: kv.OpKeepAlive, Lease: id, TTL: ttl, Once: c.once(body)})
	if err != nil {
		return err
	}
	info := leaseInfo{Lease: *res.Lease, remaining: res.Lease.TTL}
	// What the command did is applied here, so that a local read shows it. An
	// error can only say that the lease has ended since, and its keys with it.
	ctx, cancel := c.bounded()
	defer cancel()
	if now, err := c.api.b.lease(ctx, id, readOptions{stale: true}); err == nil && c.holdAnswer(keysBytes(now.keys), false) == nil {
		info.keys = now.keys
	}
	return c.writeJSON(http.StatusOK, apiLease(&info))
}

func (c *apiCall) revokeLease(id int64) error {
	if err := c.parseOptions(optIdempotency); err != nil {
		return err
	}
	res, err := c.proposeInSlot(kv.Command{Op: kv.OpRevoke, Lease: id, Once: c.once(nil)})
	if err != nil {
		return err
	}
	h := c.w.Header()
	h["Kv-Deleted"] = []string{strconv.FormatInt(res.Deleted, 10)}
	h["Kv-Revision"] = []string{strconv.FormatInt(res.Revision, 10)}
	c.writeHeader(http.StatusNoContent)
	return nil
}

var leaseFields = jsonFields{"ttl"}

// decodeLease reads `{"ttl":"30s"}`; 0 if the field is not there.
func decodeLease(body []byte) (ttl time.Duration, err error) {
	r := jsonReader{data: body}
	_, err = r.object(leaseFields, func(string) (err error) {
		ttl, err = r.ttl()
		return err
	})
	if err == nil {
		err = r.end()
	}
	if err != nil {
		return 0, err
	}
	return ttl, nil
}

func apiLease(l *leaseInfo) api.Lease {
	a := api.Lease{ID: strconv.FormatInt(l.ID, 10), TTL: l.TTL.String(), Remaining: l.remaining.String(),
		Keys: []string{}, KeyCount: l.Lease.Keys}
	for _, key := range l.keys {
		if utf8.ValidString(key) {
			a.Keys = append(a.Keys, key)
		} else {
			a.KeysB64 = append(a.KeysB64, []byte(key))
		}
	}
	return a
}
