package main

import (
	"math"
	"net/http"
	"slices"
	"strconv"

	"pontoon/kv"
)

// Bounds of one transaction.
const (
	maxTxnOps      = 128 // in both branches together
	maxTxnCompares = 128
)

// serveTxn answers POST /v1/txn. Every transaction is one command, also one that
// only reads: its place in the log is what makes it linearizable, at the
// price of a write. GET /v1/kv reads one span for less.
func (c *apiCall) serveTxn() error {
	if c.r.Method != http.MethodPost {
		return badMethod(c.route)
	}
	if err := c.parseOptions(optIdempotency); err != nil {
		return err
	}
	txn, res, err := c.runTxn()
	if err != nil {
		return err
	}
	held := int64(0)
	for i := range res.Txn.Ops {
		held += entriesBytes(res.Txn.Ops[i].Items)
	}
	c.holdResult(held)
	c.w.Header()["Kv-Revision"] = []string{strconv.FormatInt(res.Revision, 10)}
	p := c.startPieces(headerJSON)
	p.txnResult(txn, &res)
	p.done()
	return nil
}

// runTxn holds its slot from when the body was read, as a PUT does, until the
// result is there; what that shows is the state's own memory.
func (c *apiCall) runTxn() (*kv.Txn, kv.Result, error) {
	buf := c.api.buffers.Get().(*[]byte)
	defer c.api.putBuffer(buf)
	var err error
	if *buf, err = c.readBody((*buf)[:0], c.api.l.MaxTxnBytes); err != nil {
		return nil, kv.Result{}, err
	}
	txn, err := decodeTxn(*buf, &c.api.l)
	if err != nil {
		return nil, kv.Result{}, err
	}
	if reads(txn) && !c.hasAnswerRoom() {
		return nil, kv.Result{}, c.noAnswerRoom()
	}
	if err := c.acquire(); err != nil {
		return nil, kv.Result{}, err
	}
	defer c.release()
	res, err := c.propose(kv.Command{Op: kv.OpTxn, Txn: txn, Once: c.once(*buf)})
	return txn, res, err
}

func reads(txn *kv.Txn) bool {
	isGet := func(op kv.TxnOp) bool { return op.Op == kv.OpGet }
	return slices.ContainsFunc(txn.Then, isGet) || slices.ContainsFunc(txn.Else, isGet)
}

// txnReader decodes one transaction. The values are part of the body, and gone
// with its buffer.
type txnReader struct {
	jsonReader
	l   *limits
	ops int // in both branches
}

// decodeTxn reads the body of a transaction.
func decodeTxn(body []byte, l *limits) (*kv.Txn, error) {
	r := txnReader{jsonReader: jsonReader{data: body}, l: l}
	txn := &kv.Txn{}
	_, err := r.object(txnFields, func(name string) (err error) {
		switch name {
		case "if":
			txn.If, err = r.compares()
		case "then":
			txn.Then, err = r.branch()
		case "else":
			txn.Else, err = r.branch()
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return txn, r.end()
}

var (
	txnFields     = jsonFields{"if", "then", "else"}
	compareFields = jsonFields{"key", "key_b64", "op", "mod_revision", "create_revision", "version", "value", "value_b64", "exists"}
	opFields      = jsonFields{"put", "delete", "get"}
	putFields     = jsonFields{"key", "key_b64", "value", "value_b64", "ttl", "lease"}
	deleteFields  = jsonFields{"key", "key_b64", "prefix", "prefix_b64", "start", "start_b64", "end", "end_b64", "all"}
	getFields     = append(deleteFields[:len(deleteFields):len(deleteFields)], "limit", "keys")
)

func (r *txnReader) compares() (all []kv.Compare, err error) {
	err = r.array(func(i int) error {
		if i == maxTxnCompares {
			return r.bad("more than " + strconv.Itoa(maxTxnCompares) + " comparisons")
		}
		cmp, err := r.compare()
		all = append(all, cmp)
		return err
	})
	return all, err
}

func (r *txnReader) compare() (kv.Compare, error) {
	cmp := kv.Compare{Op: kv.Equal}
	number := func(target kv.Target) (err error) {
		cmp.Target = target
		cmp.Number, err = r.integer(0, math.MaxInt64)
		return err
	}
	seen, err := r.object(compareFields, func(name string) (err error) {
		switch name {
		case "key", "key_b64":
			cmp.Key, err = r.key(name == "key_b64", r.l.MaxKeyBytes)
		case "op":
			cmp.Op, err = r.operator()
		case "mod_revision":
			err = number(kv.TargetModRevision)
		case "create_revision":
			err = number(kv.TargetCreateRevision)
		case "version":
			err = number(kv.TargetVersion)
		case "value", "value_b64":
			cmp.Target = kv.TargetValue
			cmp.Value, err = r.value(name == "value_b64", r.l.MaxValueBytes)
		case "exists":
			cmp.Target = kv.TargetExists
			var exists bool
			if exists, err = r.boolean(); exists {
				cmp.Number = 1
			}
		}
		return err
	})
	if err == nil {
		err = r.oneOf(seen, "key", "key_b64")
	}
	if err == nil {
		err = r.oneOf(seen, "mod_revision", "create_revision", "version", "value", "value_b64", "exists")
	}
	if err == nil && cmp.Target == kv.TargetExists && cmp.Op != kv.Equal && cmp.Op != kv.NotEqual {
		err = r.bad(`exists goes with the op "=" or "!=" only`)
	}
	return cmp, err
}

func (r *txnReader) operator() (kv.CompareOp, error) {
	s, err := r.text()
	if err != nil {
		return 0, err
	}
	switch string(s) {
	case "=":
		return kv.Equal, nil
	case "!=":
		return kv.NotEqual, nil
	case "<":
		return kv.Less, nil
	case ">":
		return kv.Greater, nil
	}
	return 0, r.bad(`want "=", "!=", "<" or ">", not ` + quoteShort(string(s)))
}

// branch reads the operations of `then` or `else`. It refuses an operation that
// would undo another one of its branch, since one revision cannot show both.
func (r *txnReader) branch() (ops []kv.TxnOp, err error) {
	err = r.array(func(int) error {
		if r.ops++; r.ops > maxTxnOps {
			return r.bad("more than " + strconv.Itoa(maxTxnOps) + " operations in then and else together")
		}
		op, err := r.op()
		if err != nil {
			return err
		}
		for j := range ops {
			switch earlier := &ops[j]; {
			case earlier.Op != kv.OpPut:
			case op.Op == kv.OpPut && op.Key == earlier.Key:
				return r.bad("it puts the key " + quoteShort(op.Key) + ", which " + r.sibling(j) + " puts as well")
			case op.Op == kv.OpDeleteRange && op.Span.Contains(earlier.Key):
				return r.bad("it deletes the key " + quoteShort(earlier.Key) + ", which " + r.sibling(j) + " puts; to replace a key, delete it first")
			}
		}
		ops = append(ops, op)
		return nil
	})
	return ops, err
}

// sibling is the place of another element of the array that is being read.
func (r *txnReader) sibling(i int) string {
	last := &r.path[len(r.path)-1]
	own := last.index
	last.index = i
	place := r.place()
	last.index = own
	return place
}

func (r *txnReader) op() (op kv.TxnOp, err error) {
	seen, err := r.object(opFields, func(name string) (err error) {
		switch name {
		case "put":
			op, err = r.put()
		case "delete":
			op, err = r.spanOp(kv.OpDeleteRange, deleteFields)
		case "get":
			op, err = r.spanOp(kv.OpGet, getFields)
		}
		return err
	})
	if err == nil {
		err = r.oneOf(seen, opFields...)
	}
	return op, err
}

func (r *txnReader) put() (kv.TxnOp, error) {
	op := kv.TxnOp{Op: kv.OpPut}
	seen, err := r.object(putFields, func(name string) (err error) {
		switch name {
		case "key", "key_b64":
			op.Key, err = r.key(name == "key_b64", r.l.MaxKeyBytes)
		case "value", "value_b64":
			op.Value, err = r.value(name == "value_b64", r.l.MaxValueBytes)
		case "ttl":
			op.TTL, err = r.ttl()
		case "lease":
			op.Lease, err = r.lease()
		}
		return err
	})
	if err == nil {
		err = r.oneOf(seen, "key", "key_b64")
	}
	if err == nil {
		err = r.oneOf(seen, "value", "value_b64")
	}
	if err == nil && seen.count("ttl", "lease") == 2 {
		err = r.bad("the fields ttl and lease contradict each other; give one")
	}
	return op, err
}

// spanOp reads a delete or a get.
func (r *txnReader) spanOp(kind kv.Op, fields jsonFields) (kv.TxnOp, error) {
	op := kv.TxnOp{Op: kind}
	var start, end, prefix, key string
	var all bool
	seen, err := r.object(fields, func(name string) (err error) {
		switch name {
		case "key", "key_b64":
			key, err = r.key(name == "key_b64", r.l.MaxKeyBytes)
		case "prefix", "prefix_b64":
			prefix, err = r.bound(name == "prefix_b64")
		case "start", "start_b64":
			start, err = r.bound(name == "start_b64")
		case "end", "end_b64":
			end, err = r.key(name == "end_b64", r.l.MaxKeyBytes)
		case "all":
			all, err = r.boolean()
		case "limit":
			var n int64
			n, err = r.integer(1, kv.MaxTxnItems)
			op.Limit = int(n)
		case "keys":
			op.KeysOnly, err = r.boolean()
		}
		return err
	})
	if err != nil {
		return op, err
	}
	switch {
	case seen.count("key", "key_b64") > 0:
		op.Span = kv.SingleKey(key)
	case seen.count("prefix", "prefix_b64") > 0:
		op.Span = kv.Prefix(prefix)
	default:
		op.Span = kv.Span{Start: start, End: end}
	}
	return op, r.checkSpan(seen, op.Span, all)
}

// bound reads a prefix or the start of a range, which may be empty.
func (r *txnReader) bound(asBase64 bool) (string, error) {
	b, err := r.bytes(asBase64)
	if err == nil && len(b) > r.l.MaxKeyBytes {
		err = &httpRefusal{err: errKeyTooLong, detail: r.place() + ": it has " + strconv.Itoa(len(b)) +
			" bytes; the limit is " + strconv.Itoa(r.l.MaxKeyBytes)}
	}
	return string(b), err
}

// checkSpan makes sure that the keys were named in exactly one way, and that
// all keys are meant where all keys are named.
func (r *txnReader) checkSpan(seen jsonSeen, span kv.Span, all bool) error {
	forms := seen.count("key", "key_b64") + seen.count("prefix", "prefix_b64")
	starts, ends := seen.count("start", "start_b64"), seen.count("end", "end_b64")
	if starts+ends > 0 {
		forms++
	}
	everything := span == kv.Span{}
	switch {
	case forms > 1 || starts > 1 || ends > 1:
		return r.bad("want exactly one of key, prefix, or start and end")
	case span.Empty():
		return r.bad("no key can lie between start and end")
	case everything && !all:
		return r.bad(`it names no keys; give key, prefix, or start and end, or "all":true for all keys`)
	case all && !everything:
		return r.bad("all contradicts the field that names keys; give one")
	}
	return nil
}

// txnResult writes an api.TxnResult. It is written by hand because gets return up
// to 4 MiB, which encoding/json would go through twice.
func (p *pieces) txnResult(txn *kv.Txn, res *kv.Result) {
	branch := txn.Then
	if !res.Txn.Succeeded {
		branch = txn.Else
	}
	p.buf = strconv.AppendBool(append(p.buf, `{"succeeded":`...), res.Txn.Succeeded)
	p.buf = strconv.AppendInt(append(p.buf, `,"revision":`...), res.Revision, 10)
	p.buf = append(p.buf, `,"results":[`...)
	for i := range res.Txn.Ops {
		if i > 0 {
			p.buf = append(p.buf, ',')
		}
		p.opResult(&branch[i], &res.Txn.Ops[i])
	}
	p.buf = append(p.buf, "]}\n"...)
}

func (p *pieces) opResult(op *kv.TxnOp, res *kv.OpResult) {
	switch op.Op {
	case kv.OpPut:
		p.buf = appendEntry(append(p.buf, `{"put":`...), &res.Entry, false) // the client has the value
	case kv.OpDeleteRange:
		p.buf = strconv.AppendInt(append(p.buf, `{"delete":{"deleted":`...), res.Deleted, 10)
		p.buf = append(p.buf, '}')
	case kv.OpGet:
		p.buf = strconv.AppendInt(append(p.buf, `{"get":{"count":`...), int64(res.Count), 10)
		p.buf = append(p.buf, `,"items":[`...)
		for i := range res.Items {
			if i > 0 {
				p.buf = append(p.buf, ',')
			}
			e := listEntry(&res.Items[i], op.KeysOnly)
			p.entry(&e)
		}
		p.buf = append(p.buf, `]}`...)
	}
	p.buf = append(p.buf, '}')
}
